from __future__ import annotations

import json
import random
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import data_prep.tokenizing.report as report_module
from data_prep.corpora import Document
from data_prep.synthetic import story
from data_prep.tokenizing.report import (
    code_points,
    fit_report,
    gather,
    open_other,
    planes,
    tokenizer_report,
    write_report,
)
from data_prep.tokenizing.takeover import examine, import_tokenizer
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.errors import DataError


def _documents(count: int) -> list[Document]:
    rng = random.Random(0)
    return [
        Document(story(rng, language), language, f"{language}-{n % 2}", str(n))
        for n in range(count)
        for language in ("en", "pl")
    ]


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(_documents(40), 600)


@pytest.fixture(scope="module")
def saved(trained: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "good.json"
    save_tokenizer(trained, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def test_the_sample_is_bounded_fair_and_repeatable() -> None:
    documents = [Document(f"{n}", "en", "web", "") for n in range(10_000)] + [Document("y" * 50_000, "pl", "web", "")]
    texts = gather(documents)
    assert texts == gather(documents)
    assert len(texts["web", "en"]) == 2000
    assert 4500 < sum(map(int, texts["web", "en"])) / 2000 < 5500
    assert [len(text) for text in texts["web", "pl"]] == [20_000]


def test_languages_and_sources_add_up(trained: Tokenizer) -> None:
    texts = gather(_documents(10))
    languages, sources = fit_report(trained, texts), fit_report(trained, texts, by=0)
    assert [report.language for report in sources] == ["en-0", "en-1", "pl-0", "pl-1"]
    for field in ("documents", "tokens", "words", "text_bytes"):
        assert sum(getattr(report, field) for report in languages) == sum(getattr(report, field) for report in sources)


def test_a_large_group_is_not_encoded_at_once(trained: Tokenizer) -> None:
    sizes = []

    class Watched:
        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            sizes.append(len(texts))
            return trained.encode_batch_fast(texts, **options)

        def decode_batch(self, ids: list[list[int]], **options: Any) -> Any:
            return trained.decode_batch(ids, **options)

    texts = gather(_documents(120))
    assert fit_report(Watched(), texts) == fit_report(trained, texts)  # type: ignore[arg-type]
    assert sum(sizes) == 240
    assert max(sizes) <= 64


@pytest.mark.slow
def test_usage_counts_every_entry(trained: Tokenizer) -> None:
    usage = tokenizer_report(trained, {("s", "en"): ["aaab" * 3 + " zażółć"]}, {})["usage"]
    ids = trained.encode("aaab" * 3 + " zażółć", add_special_tokens=False).ids
    assert usage["tokens"] == len(ids)
    assert usage["unused"] == 600 - 11 - len(set(ids))
    assert usage["single_use"] == sum(ids.count(index) == 1 for index in set(ids))
    assert usage["counts_by_rank"][0] == [1, max(ids.count(index) for index in ids)]


def test_lengths_are_in_bytes(trained: Tokenizer) -> None:
    lengths = tokenizer_report(trained, {("s", "pl"): ["ąąą"]}, {})["token_lengths"]
    assert sum(lengths["entries"]) == 600 - 11
    assert lengths["entries"][0] == 256
    assert sum(n * count for n, count in zip(lengths["bytes"], lengths["occurrences"], strict=True)) == 6


def test_every_assigned_character_is_tried() -> None:
    tried = {code for plane in range(17) for code in code_points(plane)}
    for code in (0, 0x41, 0x17C, 0xFEFF, 0x1F98A, 0x20000, 0x2A6DF, 0xE0001, 0x10FFF0):
        assert code in tried, hex(code)
    assert not any(0xD800 <= code <= 0xDFFF for code in tried)
    assert sum(unicodedata.category(chr(code)) not in ("Cn", "Co") for code in tried) == sum(
        unicodedata.category(chr(code)) not in ("Cn", "Co", "Cs") for code in range(0x110000)
    )


def test_planes_come_back_and_a_loss_is_counted(trained: Tokenizer) -> None:
    found = planes(trained)
    assert [plane["plane"] for plane in found] == list(range(17))
    assert all(plane["failures"] == 0 < plane["code_points"] for plane in found)
    lossy = Tokenizer.from_str(trained.to_str())
    lossy.normalizer = normalizers.Replace("\U0001f98a", "fox")
    assert [(plane["plane"], plane["first_failures"]) for plane in planes(lossy) if plane["failures"]] == [
        (1, ["U+1F98A"])
    ]


@pytest.mark.slow
def test_the_report_is_written_with_pictures_and_comparisons(trained: Tokenizer, saved: Path, tmp_path: Path) -> None:
    small = train_tokenizer(_documents(10), 300)
    texts = gather(_documents(10))
    report = tokenizer_report(trained, texts, {"small": small, "same": open_other(saved)})
    names = write_report(report, "mine", tmp_path / "report")
    assert sorted(names) == sorted(path.name for path in (tmp_path / "report").iterdir())
    stored = json.loads((tmp_path / "report" / "report.json").read_text())
    assert stored["compared"]["same"]["languages"] == stored["languages"]
    assert stored["compared"]["small"]["vocab_size"] == 300
    assert (
        stored["compared"]["small"]["languages"]["pl"]["tokens_per_word"] > stored["languages"]["pl"]["tokens_per_word"]
    )
    assert set(stored["sources"]) == {"en-0", "en-1", "pl-0", "pl-1"}
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_other_tokenizers_need_not_be_ours_but_must_open(tmp_path: Path, trained: Tokenizer) -> None:
    words = _word_piece()
    words.save(str(tmp_path / "words.json"))
    report = tokenizer_report(trained, gather(_documents(3)), {"words": open_other(tmp_path / "words.json")})
    assert report["compared"]["words"]["languages"]["pl"]["round_trip_failures"] > 0
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(DataError, match=r"bad.json cannot be compared"):
        open_other(tmp_path / "bad.json")
    with pytest.raises(DataError, match="no text to measure"):
        tokenizer_report(trained, {}, {})


# ---------------------------------------------------------------------------------------------------------------------
# Import
# ---------------------------------------------------------------------------------------------------------------------


def _word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator([document.text for document in _documents(5)], trainer)
    return tokenizer


TEXTS = [document.text for document in _documents(5)]


def test_a_good_tokenizer_is_copied(saved: Path, tmp_path: Path) -> None:
    checks, sha256 = import_tokenizer(saved, tmp_path / "new" / "t.json", TEXTS)
    assert [check.problem for check in checks] == [None] * 11
    assert (tmp_path / "new" / "t.json").read_bytes() == saved.read_bytes()
    assert sha256 == tokenizer_fingerprint(saved.read_text())


def _failed(content: dict[str, Any], path: Path) -> dict[str, str]:
    """What fails; of Unicode the first planes alone are tried, as all of it takes a quarter of a second."""
    path.write_text(json.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_module, "code_points", lambda plane: code_points(plane)[:2000] if plane < 2 else ())
        return {check.name: check.problem for check in examine(path, TEXTS) if check.problem is not None}


def _without_special(content: dict[str, Any]) -> None:
    content["added_tokens"] = []
    for token in SPECIAL_TOKENS:
        del content["model"]["vocab"][token]


def _shifted(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    order = sorted(vocabulary, key=vocabulary.get)
    content["model"]["vocab"] = {token: index for index, token in enumerate(order[1:] + order[:1])}
    for item in content["added_tokens"]:
        item["id"] = content["model"]["vocab"][item["content"]]


def _above(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 65_536


def _gap(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] += 5


def _added(special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": 600, "content": "Once", "special": special} | flags


BAD: dict[str, tuple[Any, str, str]] = {
    "no control tokens": (_without_special, "control tokens at ids 0 to 10", r"\[PAD\] is missing"),
    "shifted ids": (_shifted, "control tokens at ids 0 to 10", r"\[PAD\] is 599, \[UNK\] is 0"),
    "too large an id": (_above, "ids of 16 bits without gaps", "largest id is 65536"),
    "a gap": (_gap, "ids of 16 bits without gaps", "5 ids below 604"),
    "lower case": (
        lambda content: content.update(normalizer={"type": "Lowercase"}),
        "no normaliser that changes text",
        "Lowercase changes text.*clean.normalise",
    ),
    "composing": (
        lambda content: content.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}]}),
        "every character of Unicode comes back",
        "code points do not",
    ),
    "an added token": (
        lambda content: content["added_tokens"].append(_added(False)),
        "no other added tokens",
        "'Once'.*mark them as special",
    ),
    "truncation": (
        lambda content: content.update(
            truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
        ),
        "no truncation or padding",
        "truncation",
    ),
    "dropout": (lambda content: content["model"].update(dropout=0.1), "no chance in encoding", "dropout 0.1"),
    "a prefix space": (
        lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
        "byte-level BPE",
        "add_prefix_space",
    ),
    "no decoder": (lambda content: content.update(decoder=None), "the texts come back", "do not"),
    "missing bytes": (lambda content: content["model"]["vocab"].pop("Ħ"), "byte-level BPE", "1 of the 256 bytes"),
}


def test_all_problems_stand_in_one_message_and_nothing_is_written(saved: Path, tmp_path: Path) -> None:
    content = json.loads(saved.read_text())
    _shifted(content)
    content["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(
        DataError, match=r"2 of 11 checks failed. \(1\) control tokens .* \(2\) no truncation or padding"
    ):
        import_tokenizer(tmp_path / "bad.json", tmp_path / "out.json", TEXTS)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("what", BAD)
@pytest.mark.slow
def test_each_problem_is_named_with_what_to_do(what: str, saved: Path, tmp_path: Path) -> None:
    change, check, message = BAD[what]
    content = json.loads(saved.read_text())
    change(content)
    failed = _failed(content, tmp_path / "bad.json")
    assert check in failed
    assert re.search(message, failed[check]), failed[check]


def test_tokens_across_words_are_noticed(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    failed = _failed(json.loads(tokenizer.to_str()), tmp_path / "bad.json")
    assert list(failed) == ["long texts can be cut between words"]


@pytest.mark.slow
def test_a_word_piece_tokenizer_is_refused(tmp_path: Path) -> None:
    failed = _failed(json.loads(_word_piece().to_str()), tmp_path / "words.json")
    assert "the model is WordPiece" in failed["byte-level BPE"]
    assert "every character of Unicode comes back" in failed


def test_special_tokens_of_others_are_harmless(saved: Path, tmp_path: Path) -> None:
    content = json.loads(saved.read_text())
    content["added_tokens"].append(_added(True))
    (tmp_path / "t.json").write_text(json.dumps(content))
    checks, _ = import_tokenizer(tmp_path / "t.json", tmp_path / "out.json", ["Once upon a time Once"])
    assert all(check.problem is None for check in checks)


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        examine(tmp_path / "none.json", [])
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"not a tokenizer\.json.*save_pretrained"):
        examine(tmp_path / "bad.json", [])
