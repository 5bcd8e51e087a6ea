"""From interactions to ids and folders."""

from __future__ import annotations

import json
import random
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from data_prep import synthetic
from data_prep.building.encode import Backend, open_backend
from data_prep.building.workers import Progress
from data_prep.corpora import Document
from data_prep.interactions import build as interaction_build
from data_prep.interactions import synthetic as synthetic_interactions
from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.interactions.reader import InteractionCounts, find_record_files, read_records
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.data.interactions import NO_LOSS, answer_labels
from rxt_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    rng = random.Random(0)
    texts = [(synthetic.story(rng, language), language) for _ in range(40) for language in ("en", "pl")]
    trained = train_tokenizer((Document(text, language, language, "") for text, language in texts), 500)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(trained, path)
    return trained, path


def write_records(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _request(inputs: Path, out: Path, tokenizer: tuple[Tokenizer, Path], **changes: Any) -> InteractionRequest:
    return InteractionRequest((inputs,), out, tokenizer[1], **({"seq_len": 128, "eval_fraction": 0.0} | changes))


def _texts(out: Path, tokenizer: Tokenizer, source: int = 0, split: str = "train") -> list[str]:
    """Every segment of a built dataset of single interactions, decoded, in the order of its records."""
    opened = TokenDataset(out)
    found = {}
    for row in range(opened.rows(source, split)):
        tokens = opened.read(split, np.array([source]), np.array([row])).tokens_RT[0].tolist()
        at = 0
        for piece in opened.segments(split, source, row):
            found[piece.document] = tokenizer.decode(tokens[at : at + piece.length], skip_special_tokens=False)
            at += piece.length
    return [found[ordinal] for ordinal in sorted(found)]


def test_the_beta_template_spells_every_part_and_text_never_spells_a_control_token(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path]
) -> None:
    path = write_records(
        tmp_path / "x.en.jsonl",
        {"query": "List[T] [A]", "answer": "arr[A][EOS]", "think": "[Q]", "tool_call": "c[C]", "internal": "[PAD]"},
        {"tool_result": "42", "answer": "It is 42."},
        {"query": "2*3?", "tool_call": "2*3"},
        {"query": "2*3?", "think": "hm", "tool_call": "2*3"},
    )
    result = build_interactions(_request(path, tmp_path / "out", tokenizer))
    assert _texts(tmp_path / "out", tokenizer[0]) == [
        "[BOS][I][PAD][Q]List[T] [A][T][Q][A]arr[A][EOS][C]c[C][EOS]",
        "[BOS][U]42[A]It is 42.[EOS]",
        "[BOS][Q]2*3?[A][C]2*3[EOS]",
        "[BOS][Q]2*3?[T]hm[C]2*3[EOS]",
    ]
    # Ids, not letters: what decodes to "[T]" inside a text is not the control token.
    opened = TokenDataset(tmp_path / "out")
    tokens = opened.read("train", np.array([0]), np.array([0])).tokens_RT
    controls = [token for token in tokens[tokens < 11].tolist() if token]
    assert controls.count(2) == controls.count(3) == 4
    assert len(controls) == 7 + 4 + 5 + 5
    assert result.counts.escaped_literals == 7
    targets = int((answer_labels(tokens) != NO_LOSS).sum())
    assert result.sources["en"].targets == targets > 0
    assert result.sources["en"].tokens == int((tokens != 0).sum())


def test_the_alpha_template_has_a_query_and_an_answer(tmp_path: Path, tokenizer: tuple[Tokenizer, Path]) -> None:
    path = write_records(
        tmp_path / "x.en.jsonl",
        {"query": "q", "answer": "a", "think": "t", "internal": "i"},
        {"tool_result": "r", "answer": "a"},
        {"query": "q", "tool_call": "c"},
    )
    counts = build_interactions(_request(path, tmp_path / "out", tokenizer, template="alpha")).counts
    assert _texts(tmp_path / "out", tokenizer[0]) == ["[BOS][Q]q[A]a[EOS]"]
    assert (counts.parts_left_out, counts.not_in_template) == (2, 2)


def test_the_oldest_text_of_a_long_query_goes_and_answers_are_never_cut(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path]
) -> None:
    long_query = " ".join(f"word{n}" for n in range(60)) + " THE END OF THE QUESTION, which is what counts?"
    answer = "x y " * 20
    path = write_records(
        tmp_path / "x.en.jsonl",
        {"query": long_query, "answer": answer},
        {"query": "short", "answer": "z " * 300},
        {"query": "short", "answer": "fits"},
    )
    counts = build_interactions(_request(path, tmp_path / "out", tokenizer)).counts
    first, last = _texts(tmp_path / "out", tokenizer[0])
    assert (counts.shortened_queries, counts.too_long) == (1, 1)
    query, kept_answer = first.removesuffix("[EOS]").removeprefix("[BOS][Q]").split("[A]")
    assert long_query.endswith(query)
    assert len(query) > 40
    assert kept_answer == answer
    assert last == "[BOS][Q]short[A]fits[EOS]"
    rows = TokenDataset(tmp_path / "out").read("train", np.array([0, 0]), np.arange(2))
    assert max(rows.seg_len_I) == 128


def test_a_dialogue_with_a_turn_that_cannot_fit_is_dropped_whole(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path]
) -> None:
    fine = {"query": "q", "answer": "a"}
    path = write_records(tmp_path / "x.en.jsonl", {"interactions": [fine, {"query": "q", "answer": "z " * 300}, fine]},
                  {"interactions": [fine, fine]})  # fmt: skip
    result = build_interactions(_request(path, tmp_path / "out", tokenizer, kind="dialogues"))
    assert result.counts.too_long == 1
    opened = DialogueDataset(tmp_path / "out")
    assert [len(opened.dialogue(index)) for index in range(len(opened))] == [2]


def test_dialogues_come_back_as_they_were_told(tmp_path: Path, tokenizer: tuple[Tokenizer, Path]) -> None:
    synthetic_interactions.write_interactions(tmp_path / "in", 60_000)
    result = build_interactions(_request(tmp_path / "in/dialogues", tmp_path / "out", tokenizer, kind="dialogues"))
    for language in ("en", "pl"):
        (file,) = find_record_files([tmp_path / f"in/dialogues/{language}.jsonl"])
        records = list(read_records(file, InteractionCounts()))
        opened = DialogueDataset(tmp_path / "out", source=language)
        assert len(opened) == len(records) == result.sources[language].dialogues
        for index, record in enumerate(records):
            turns = [tokenizer[0].decode(t.tolist(), skip_special_tokens=False) for t in opened.dialogue(index)]
            assert len(turns) == len(record.interactions)
            for text, item in zip(turns, record.interactions, strict=True):
                assert all(part in text for part in vars(item).values())
    stated = result.manifest.totals
    tokens = [DialogueDataset(tmp_path / "out").batch([index]) for index in range(stated.dialogues)]
    assert stated.tokens == sum(int(batch.lengths_BU.sum()) for batch in tokens)
    assert stated.targets == sum(int((batch.labels_BUT != NO_LOSS).sum()) for batch in tokens)


def test_records_are_held_out_by_their_text(tmp_path: Path, tokenizer: tuple[Tokenizer, Path]) -> None:
    records = [{"query": f"{n}?", "answer": f"{n}!"} for n in range(200)]
    a = write_records(tmp_path / "a/x.en.jsonl", *records)
    b = write_records(tmp_path / "b/y.en.jsonl", *reversed(records), records[0])
    held = []
    for number, path in enumerate((a, b)):
        out = tmp_path / f"out{number}"
        build_interactions(_request(path, out, tokenizer, eval_fraction=0.2))
        held.append(set(_texts(out, tokenizer[0], split="eval")))
        assert not held[-1] & set(_texts(out, tokenizer[0]))
    assert held[0] == held[1]
    assert 20 < len(held[0]) < 60
    two = write_records(tmp_path / "c/two.en.jsonl", *records[:2])
    build_interactions(_request(two, tmp_path / "small", tokenizer, eval_fraction=0.0001))
    assert len(_texts(tmp_path / "small", tokenizer[0], split="eval")) == 1


@pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken is missing")
@pytest.mark.slow
def test_the_fast_backend_changes_nothing(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    synthetic_interactions.write_interactions(tmp_path / "in", 30_000)
    opened: list[str] = []

    def watched(name: str, file: Path, threads: bool) -> Backend:
        opened.append(name)
        return open_backend(name, file, threads)

    monkeypatch.setattr(interaction_build, "open_backend", watched)
    requests = [_request(tmp_path / "in/dialogues", tmp_path / name, tokenizer, kind="dialogues") for name in "ab"]
    slow = build_interactions(requests[0])
    monkeypatch.setattr(interaction_build, "_WORTH_A_CHECK", 0)
    fast = build_interactions(requests[1])
    assert opened == ["tokenizers", "gigatoken"]
    assert (fast.manifest, fast.sources) == (slow.manifest, slow.sources)


@pytest.mark.parametrize("kind", ["single", "dialogues"])
@pytest.mark.slow
def test_an_interrupted_build_is_finished_with_the_same_digest(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(interaction_build, "_UNIT_BYTES", 10_000)
    synthetic_interactions.write_interactions(tmp_path / "in", 80_000)
    inputs = tmp_path / "in" / kind
    whole = build_interactions(_request(inputs, tmp_path / "whole", tokenizer, kind=kind))
    assert whole.units == 2
    calls = []

    def stop_at_second(now: Progress) -> None:
        calls.append(now.done)
        if now.done == 1 and now.what == "Building":
            raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build_interactions(_request(inputs, out, tokenizer, kind=kind, workers=1), show=stop_at_second)
    (next(out.glob("*/train")) / ".u00009-000.arrow.tmp.77").write_bytes(b"left by a kill")
    again = build_interactions(_request(inputs, out, tokenizer, kind=kind))
    assert (again.units_kept, again.manifest) == (1, whole.manifest)
    names = [sorted(p.relative_to(root) for p in root.rglob("*")) for root in (tmp_path / "whole", out)]
    assert names[0] == names[1]
    # A shard that is gone is built again, and only its unit.
    (out / "pl/train/u00001-000.arrow").unlink()
    mended = build_interactions(_request(inputs, out, tokenizer, kind=kind))
    assert (mended.units_kept, mended.manifest) == (1, whole.manifest)


def test_a_folder_is_never_changed_to_another_request(tmp_path: Path, tokenizer: tuple[Tokenizer, Path]) -> None:
    path = write_records(tmp_path / "x.en.jsonl", {"query": "q", "answer": "a"})
    out = tmp_path / "out"
    build_interactions(_request(path, out, tokenizer))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    for changes, message in (
        ({"template": "alpha"}, "template was beta and is now alpha"),
        ({"kind": "dialogues"}, "kind was single and is now dialogues"),
        ({"seq_len": 64}, "seq_len was 128 and is now 64"),
    ):
        with pytest.raises(DataError, match=message):
            build_interactions(_request(path, out, tokenizer, **changes))
    write_records(path, {"query": "q", "answer": "b"})
    with pytest.raises(DataError, match=r"the input files differ: .*x\.en\.jsonl \(other content\)"):
        build_interactions(_request(path, out, tokenizer))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    foreign = write_records(tmp_path / "foreign/mine.txt", "mine").parent
    with pytest.raises(DataError, match="is not empty and is not a dataset"):
        build_interactions(_request(path, foreign, tokenizer))
    assert sorted(p.name for p in foreign.iterdir() if not p.name.startswith(".")) == ["mine.txt"]


def test_requests_that_cannot_work_are_refused(tmp_path: Path, tokenizer: tuple[Tokenizer, Path]) -> None:
    dialogue = {"interactions": [{"query": "q", "answer": "a"}] * 3}
    path = write_records(tmp_path / "x.en.jsonl", {"query": "q", "answer": "a"}, dialogue)
    with pytest.raises(DataError, match=r"line 2 is a dialogue of 3 interactions.*--kind dialogues"):
        build_interactions(_request(path, tmp_path / "o1", tokenizer))
    empty = write_records(tmp_path / "y.en.jsonl", {"query": "", "answer": "a"})
    with pytest.raises(DataError, match=r"nothing to build: 1 files hold no usable record \(1 empty"):
        build_interactions(_request(empty, tmp_path / "o2", tokenizer))
    with pytest.raises(ConfigError, match="row length is 1"):
        build_interactions(_request(path, tmp_path / "o3", tokenizer, seq_len=1))
    with pytest.raises(ConfigError, match=r"--eval-fraction is 1\.0"):
        _request(path, tmp_path / "o4", tokenizer, eval_fraction=1.0)
    assert not (tmp_path / "o3").exists()
