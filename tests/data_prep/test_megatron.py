"""Megatron's .bin/.idx, with megatron-core itself writing and reading them."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data_prep import synthetic
from data_prep.building import builder
from data_prep.building.workers import Progress
from data_prep.corpora import Document
from data_prep.megatron import importing as megatron
from data_prep.megatron.corpus import MegatronCorpus
from data_prep.megatron.description import name_documents, read_description
from data_prep.megatron.exporting import export_megatron
from data_prep.megatron.importing import ImportRequest, import_megatron
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.sealing import sealed_json
from rxt_dist.errors import ConfigError, DataError

BOS, EOS = 2, 3
Documents = list[list[int]]


def reference() -> Any:
    """megatron-core's own code. Its import takes two seconds, and other processes read this file too."""
    from megatron.core.datasets import indexed_dataset

    return indexed_dataset


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = random.Random(0)
    return [synthetic.story(rng, language) for _ in range(40) for language in ("en", "pl")]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> tuple[Tokenizer, Path]:
    trained = train_tokenizer((Document(text, "en", "en", "") for text in texts), 600)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(trained, path)
    return trained, path


@pytest.fixture(scope="module")
def documents(texts: list[str], tokenizer: tuple[Tokenizer, Path]) -> Documents:
    return [tokenizer[0].encode(text, add_special_tokens=False).ids for text in texts]


def _write(prefix: Path, documents: list[list[list[int]]], dtype: Any = np.int32) -> Path:
    """A corpus of documents of sequences."""
    builder = reference().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence, dtype=torch.int64))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def _request(prefix: Path, tokenizer: tuple[Tokenizer, Path], **changes: Any) -> ImportRequest:
    values = {"seq_len": 256, "language": "en", "source": "web", "eval_fraction": 0.0, "workers": 1} | changes
    return ImportRequest(prefix, prefix.parent / "out", tokenizer[1], **values)


def _read_back(prefix: Path) -> Documents:
    read = reference().IndexedDataset(str(prefix))
    assert read.document_indices.tolist() == list(range(len(read) + 1))
    return [read[index].tolist() for index in range(len(read))]


def _framed(documents: Documents) -> Documents:
    return [[BOS, *ids, EOS] for ids in documents]


# ---------------------------------------------------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_a_corpus_comes_back_from_the_shards_document_by_document(
    tmp_path: Path,
    tokenizer: tuple[Tokenizer, Path],
    documents: Documents,
    monkeypatch: pytest.MonkeyPatch,
    dtype: Any,
) -> None:
    monkeypatch.setattr(megatron, "_UNIT_BYTES", 20_000)
    monkeypatch.setattr(megatron, "_WINDOW_BYTES", 3000)
    prefix = _write(tmp_path / "in", [[ids] for ids in documents], dtype)
    result = import_megatron(_request(prefix, tokenizer, seq_len=128))
    assert result.units > 1
    assert result.counts.documents == len(documents)
    totals = result.manifest.totals
    assert (totals.documents, totals.tokens) == (len(documents), sum(len(ids) + 2 for ids in documents))
    assert totals.split_documents == sum(len(ids) + 2 > 128 for ids in documents) > 0
    (corpus,) = export_megatron(tmp_path / "out", tmp_path / "deep/er/back")
    assert (corpus.documents, corpus.tokens) == (totals.documents, totals.tokens)
    assert corpus.prefix.name == "back-web-train"
    assert _read_back(corpus.prefix) == _framed(documents)
    names = ["back-web-train.bin", "back-web-train.idx", "back-web-train.rxt.json"]
    assert sorted(path.name for path in corpus.prefix.parent.iterdir()) == names


def test_text_bytes_and_training_rows_are_those_of_the_text(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents, texts: list[str]
) -> None:
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    manifest = import_megatron(_request(prefix, tokenizer, eval_fraction=0.2)).manifest
    assert manifest.totals.text_bytes == sum(len(text.encode()) for text in texts)
    (source,) = manifest.sources
    assert (source.name, source.language) == ("web", "en")
    assert source.train.totals.documents + source.eval.totals.documents == len(documents)
    assert 0.05 < source.eval.totals.documents / len(documents) < 0.4
    rows = source.train.totals.rows
    read = TokenDataset(tmp_path / "out").read("train", np.zeros(rows, np.int64), np.arange(rows))
    assert read.tokens_RT.max() < 600
    both = export_megatron(tmp_path / "out", tmp_path / "back")
    assert [corpus.split for corpus in both] == ["train", "eval"]
    exported = [ids for corpus in both for ids in _read_back(corpus.prefix)]
    assert sorted(exported) == sorted(_framed(documents))


def test_ends_of_documents_are_taken_off_and_sentences_are_joined(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path]
) -> None:
    ids = [tokenizer[0].encode(text).ids for text in ("One sentence.", " Another one.", "Alone.", "No end")]
    end = tokenizer[0].encode("#").ids
    assert len(end) == 1
    items = [
        [ids[0], ids[1] + [EOS]], [[BOS, *ids[2], EOS]], [], [[EOS]], [[BOS]], [[BOS, EOS]], [ids[3]], [ids[2] + end],
    ]  # fmt: skip
    prefix = _write(tmp_path / "in", items)
    counts = import_megatron(_request(prefix, tokenizer)).counts
    assert vars(counts) == {"documents": 4, "empty": 4, "bos": 3, "eod": 4}
    (corpus,) = export_megatron(tmp_path / "out", tmp_path / "back")
    assert _read_back(corpus.prefix) == _framed([ids[0] + ids[1], ids[2], ids[3], ids[2] + end])
    named = _write(tmp_path / "named", [items[6], items[7]])
    request = _request(named, tokenizer, eod=end[0])
    result = import_megatron(ImportRequest(**(vars(request) | {"out": tmp_path / "out2"})))
    assert result.counts.eod == 1
    (corpus,) = export_megatron(tmp_path / "out2", tmp_path / "back2")
    assert _read_back(corpus.prefix) == _framed([ids[3], ids[2]])


def test_the_largest_id_survives_in_both_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron writes uint16 below 65,500 ids and int32 from there on; 65,535 must come through both."""

    class Largest:
        """As much of a tokenizer of 65,536 ids as an import asks for."""

        def get_vocab_size(self) -> int:
            return 65_536

        def id_to_token(self, number: int) -> str:
            return "ab"

    (tmp_path / "t.json").write_text('{"model": {}}')
    for module in (megatron, builder):
        monkeypatch.setattr(module, "load_tokenizer", lambda path: Largest())
    monkeypatch.setattr(megatron, "_check_tokenizer", lambda *_: None)
    documents = [[65_535, 40_000, 65_535], [32_768]]
    for dtype in (np.uint16, np.int32):
        prefix = _write(tmp_path / dtype.__name__, [[ids] for ids in documents], dtype)
        out = tmp_path / f"out-{dtype.__name__}"
        import_megatron(ImportRequest(prefix, out, tmp_path / "t.json", 16, "en", "web", None, 0.0))
        (corpus,) = export_megatron(out, tmp_path / f"back-{dtype.__name__}")
        assert _read_back(corpus.prefix) == _framed(documents)
    wide = _write(tmp_path / "wide", [[[65_536]]])
    with pytest.raises(DataError, match="document 0 holds id 65536"):
        import_megatron(ImportRequest(wide, tmp_path / "o", tmp_path / "t.json", 16, "en", "web"))


def test_an_interrupted_import_is_finished_with_the_same_digest(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "_UNIT_BYTES", 30_000)
    monkeypatch.setattr(megatron, "_WINDOW_BYTES", 5000)
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    request = _request(prefix, tokenizer, eval_fraction=0.1)
    whole = import_megatron(request)

    def stop(now: Progress) -> None:
        if now.bytes > now.total_bytes / 2:
            raise KeyboardInterrupt

    again = ImportRequest(**(vars(request) | {"out": tmp_path / "again"}))
    with pytest.raises(KeyboardInterrupt):
        import_megatron(again, show=stop)
    assert not (tmp_path / "again/dataset.json").exists()
    resumed = import_megatron(again)
    assert 0 < resumed.units_kept < resumed.units
    assert (resumed.manifest, resumed.counts) == (whole.manifest, whole.counts)
    with pytest.raises(DataError, match="seq_len was 256 and is now 64"):
        import_megatron(ImportRequest(**(vars(again) | {"seq_len": 64})))


def test_a_corpus_that_another_takes_the_place_of_while_it_is_imported_is_refused(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron, "_UNIT_BYTES", 30_000)
    monkeypatch.setattr(megatron, "_WINDOW_BYTES", 5000)
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    other = _write(tmp_path / "other", [[list(reversed(ids))] for ids in documents])

    def replace_it(now: Progress) -> None:
        if now.done and other.with_suffix(".bin").exists():
            other.with_suffix(".bin").replace(prefix.with_suffix(".bin"))

    with pytest.raises(DataError, match=r"in\.bin was changed while the dataset was built. Restore it"):
        import_megatron(_request(prefix, tokenizer), show=replace_it)
    assert len(list((tmp_path / "out/units").glob("*.json"))) == 1


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_corpus_that_vanishes_while_it_is_imported_is_named(
    suffix: str,
    tmp_path: Path,
    tokenizer: tuple[Tokenizer, Path],
    documents: Documents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(megatron, "_UNIT_BYTES", 30_000)
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    gone = prefix.with_suffix(suffix)
    checked = megatron._check_tokenizer

    def checked_and_removed(*arguments: Any) -> None:
        checked(*arguments)
        gone.rename(tmp_path / "away")

    monkeypatch.setattr(megatron, "_check_tokenizer", checked_and_removed)
    with pytest.raises(DataError, match=rf"in\{suffix} .*(cannot be read|does not exist|vanished)"):
        import_megatron(_request(prefix, tokenizer))
    monkeypatch.setattr(megatron, "_check_tokenizer", checked)
    (tmp_path / "away").rename(gone)
    corpus = MegatronCorpus(prefix)
    gone.unlink()
    if suffix == ".bin":
        with pytest.raises(DataError, match=r"in\.bin cannot be read any more .*run the same command again"):
            corpus.read(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What an export states
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def exported(tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents) -> Path:
    """The prefix of the held-out documents of a source that is not called after its language."""
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    import_megatron(_request(prefix, tokenizer, source="wiki-2", language="pl", eval_fraction=0.2))
    return next(item.prefix for item in export_megatron(tmp_path / "out", tmp_path / "ex") if item.split == "eval")


def test_source_and_language_survive(exported: Path, tmp_path: Path) -> None:
    digest = load_manifest(tmp_path / "out").root_digest
    about = read_description(exported)
    assert about == read_description(exported.with_name(exported.name + ".bin"))
    assert about is not None
    assert (about.source, about.language, about.split, about.dataset) == ("wiki-2", "pl", "eval", digest)
    naming = name_documents(exported, None, None)
    assert (naming.source, naming.language) == ("wiki-2", "pl")
    assert (
        naming.said
        == f"ex-wiki-2-eval.rxt.json: eval of source wiki-2 (pl), exported from a dataset with digest {digest[:16]}."
    )
    other = name_documents(exported, None, "en")
    assert (other.source, other.language) == ("wiki-2", "en")
    assert other.said.endswith(", taken as wiki-2 (en) as asked for.")


def test_what_nobody_states_is_said_not_to_be_known(tmp_path: Path) -> None:
    unknown = name_documents(tmp_path / "corpus", None, None)
    assert (unknown.source, unknown.language) == ("und", "und")
    assert "Nothing says which language" in unknown.said
    assert "--language" in unknown.said
    by_name = name_documents(tmp_path / "news.pl.idx", "news", None)
    assert (by_name.source, by_name.language) == ("news", "pl")
    assert "No --language given: pl, after the name" in by_name.said
    given = name_documents(tmp_path / "corpus", None, "en")
    assert (given.source, given.language, given.said) == ("en", "en", "")


def test_a_description_is_believed_of_its_own_pair_alone(
    exported: Path, tmp_path: Path, tokenizer: tuple[Tokenizer, Path]
) -> None:
    path = tmp_path / "ex-wiki-2-eval.rxt.json"
    text = path.read_bytes()
    for position in range(0, len(text), 37):
        path.write_bytes(text[:position] + bytes([text[position] ^ 1]) + text[position + 1 :])
        with pytest.raises(DataError, match="is damaged or was edited"):
            read_description(exported)
    path.write_bytes(sealed_json(json.loads(text) | {"version": 2}))
    with pytest.raises(DataError, match="version 2; this program reads"):
        read_description(exported)
    path.write_bytes(text)
    for suffix in (".bin", ".idx"):
        file = exported.with_name(exported.name + suffix)
        content = file.read_bytes()
        file.write_bytes(content[:-8] + bytes([content[-8] ^ 1]) + content[-7:])
        with pytest.raises(DataError, match=f"does not describe ex-wiki-2-eval{suffix}, which has another content"):
            read_description(exported)
        file.unlink()
        with pytest.raises(DataError, match="does not exist"):
            import_megatron(_request(exported, tokenizer))
        file.write_bytes(content)
    value = json.loads(text)
    path.write_bytes(sealed_json(value | {"tokenizer_sha256": "ef" * 32}))
    with pytest.raises(DataError, match=r"says that tokenizer efefefef.* Give the tokenizer\.json of the dataset"):
        import_megatron(_request(exported, tokenizer))
    for file in {*tmp_path.glob("ex-*.bin"), *tmp_path.glob("ex-*.idx"), *tmp_path.glob("ex-*-train*")}:
        file.unlink()
    with pytest.raises(DataError, match=r"ex-wiki-2-eval\.rxt\.json exists already"):
        export_megatron(tmp_path / "out", tmp_path / "ex")


# ---------------------------------------------------------------------------------------------------------------------
# Refusals
# ---------------------------------------------------------------------------------------------------------------------


def test_damaged_and_foreign_files_are_refused_before_anything_is_written(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents
) -> None:
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    data, index = bin_path.read_bytes(), idx_path.read_bytes()

    def refused(message: str, data: bytes = data, index: bytes = index) -> None:
        bin_path.write_bytes(data)
        idx_path.write_bytes(index)
        with pytest.raises(DataError, match=message):
            import_megatron(_request(prefix, tokenizer))
        assert not (tmp_path / "out").exists()

    refused(r"in\.bin has .* bytes, but in\.idx describes .* \(4 bytes an id\): the \.bin is cut off", data[:-2])
    refused(r"in\.bin has .* the \.bin is cut off", data + b"\0\0\0\0")
    refused(r"in\.bin holds no tokens", b"")
    refused(r"has version 2; megatron-core reads version 1", index=index[:9] + struct.pack("<Q", 2) + index[17:])
    refused(r"is not an index of Megatron's", index=b"TNTIDX\0\0" + index[8:])
    refused(r"ends within its header", index=index[:20])
    refused(r"in\.idx has .* bytes, but its header", index=index[:-8])
    floats = reference().DType.code_from_dtype(np.float32)
    refused("describes values of float32; token ids are", index=index[:17] + bytes([floats]) + index[18:])
    # The type in the index halves the ids: sizes no longer agree.
    narrow = reference().DType.code_from_dtype(np.uint16)
    refused("do not follow each other", index=index[:17] + bytes([narrow]) + index[18:])
    count = len(documents)
    pointer = 34 + 4 * count + 8
    refused("do not follow each other in the .bin", index=index[:pointer] + b"\1" + index[pointer + 1 :])
    bound = 34 + 12 * count
    refused("documents that do not follow", index=index[:bound] + b"\1" + index[bound + 1 :])
    last = len(index) - 8
    for wrong in (count - 1, count + 1, 2**63):
        message = rf"in\.idx ends its documents at sequence {wrong}, but has {count} sequences"
        refused(message, index=index[:last] + struct.pack("<Q", wrong))
    refused("multimodal", index=index + bytes(count))
    idx_path.unlink()
    with pytest.raises(DataError, match=r"in\.idx does not exist"):
        import_megatron(_request(prefix.with_suffix(".bin"), tokenizer))


def test_ids_that_are_not_the_tokenizers_text_are_refused(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents
) -> None:
    good = [[ids] for ids in documents]
    for items, message in (
        ([*good[:3], [[100, 600, 100]]], "document 3 holds id 600, but .* has 600 ids"),
        ([*good[:3], [[100, -1]]], "document 3 holds id -1"),
        ([*good[:3], [[]], [[BOS, *good[0][0], 5, 30, EOS]]], rf"document 4 .*\[Q\] \(id 5\) .* {len(good[0][0]) + 1}"),
        ([[[BOS, BOS, 30]]], r"document 0 holds the control token \[BOS\] \(id 2\) at its position 1"),
        ([[[30, EOS, EOS]]], r"\[EOS\] \(id 3\) at its position 1"),
        ([[[30, 31], [EOS, 40]]], r"\[EOS\] \(id 3\) at its position 2"),
        ([[[30, 0, 0]]], r"\[PAD\] \(id 0\)"),
        ([[[EOS]], []], "holds no document with text"),
    ):
        prefix = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "in"
        prefix.parent.mkdir()
        _write(prefix, items)
        with pytest.raises(DataError, match=message):
            import_megatron(_request(prefix, tokenizer))
        assert not (prefix.parent / "out/dataset.json").exists()


def test_another_tokenizer_with_as_many_ids_is_noticed(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents
) -> None:
    rng = random.Random(9)
    other = train_tokenizer((Document(synthetic.story(rng, "pl"), "pl", "pl", "") for _ in range(60)), 600)
    save_tokenizer(other, tmp_path / "other.json")
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    with pytest.raises(DataError, match=r"other\.json is not the tokenizer that made .* of 64 sequences"):
        import_megatron(_request(prefix, (other, tmp_path / "other.json")))
    assert not (tmp_path / "out").exists()


def test_requests_that_cannot_work_are_refused(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents
) -> None:
    prefix = _write(tmp_path / "in", [[documents[0]]])
    with pytest.raises(ConfigError, match=r"--source .*'\.\./x'"):
        _request(prefix, tokenizer, source="../x")
    with pytest.raises(ConfigError, match=r"--source .*'units' is the name of something else"):
        _request(prefix, tokenizer, source="units")
    with pytest.raises(ConfigError, match="--eval-fraction is 1"):
        _request(prefix, tokenizer, eval_fraction=1)
    with pytest.raises(ConfigError, match="row length is 70000"):
        import_megatron(_request(prefix, tokenizer, seq_len=70_000))


def test_an_export_writes_over_nothing_and_from_no_damaged_shard(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], documents: Documents
) -> None:
    prefix = _write(tmp_path / "in", [[ids] for ids in documents])
    import_megatron(_request(prefix, tokenizer))
    export_megatron(tmp_path / "out", tmp_path / "back")
    before = (tmp_path / "back-web-train.bin").read_bytes()
    with pytest.raises(DataError, match=r"back-web-train\.bin exists already"):
        export_megatron(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back-web-train.bin").read_bytes() == before
    shard = next((tmp_path / "out/web/train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=f"{shard.name} is missing or damaged"):
        export_megatron(tmp_path / "out", tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
    assert not list(tmp_path.glob(".other*"))
