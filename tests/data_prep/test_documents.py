"""Are the documents of two datasets the same, in whatever rows?"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_verbs import as_json, run
from shard_folder import Corpus, random_corpus, write_folder

from data_prep.shards.documents import Sameness, compare_documents, compare_manifests
from data_prep.shards.repack import RepackRequest, repack
from rxt_dist.data.manifest import DatasetManifest, load_manifest
from rxt_dist.errors import ConfigError, DataError


@pytest.fixture
def corpus() -> Corpus:
    return random_corpus(51, units=2, documents=50)


@pytest.fixture
def first(tmp_path: Path, corpus: Corpus) -> Path:
    write_folder(tmp_path / "a", corpus, 32)
    return tmp_path / "a"


def _quick(*roots: Path) -> Sameness:
    first, second = roots
    return compare_manifests((first, second), (load_manifest(first), load_manifest(second)))


def _read(*roots: Path) -> Sameness:
    first, second = roots
    return compare_documents((first, second), (load_manifest(first), load_manifest(second)))


def _repacked(dataset: Path, seq_len: int) -> Path:
    out = dataset.with_name(f"{dataset.name}-{seq_len}")
    repack(RepackRequest(dataset, out, seq_len, workers=1))
    return out


def test_a_repacked_dataset_has_the_same_documents(first: Path) -> None:
    short, long = _repacked(first, 16), _repacked(first, 64)
    for pair in ((first, short), (long, first), (short, long)):
        assert _quick(*pair) == Sameness(True, "origin")
        assert _read(*pair) == Sameness(True, "digest")
    told = run("diff", first, long)
    assert told.exit_code == 65
    assert "The documents are the same: one was repacked from the other" in told.stdout
    assert as_json("diff", short, long, code=65)["documents"] == {"same": True, "by": "origin", "differing": []}
    assert as_json("diff", first, first)["documents"]["by"] == "stream"


def test_equal_totals_are_no_proof(tmp_path: Path, corpus: Corpus, first: Path) -> None:
    changed = corpus["u00001"]["pl"]["train"]
    ordinal = next(number for number, ids in changed.items() if len(ids) > 3)
    changed[ordinal] = changed[ordinal][::-1].copy()
    changed[ordinal][0] = 11 if changed[ordinal][0] != 11 else 12
    write_folder(tmp_path / "b", corpus, 64)
    assert _quick(first, tmp_path / "b") == Sameness(None, "totals")
    assert _read(first, tmp_path / "b") == Sameness(False, "digest", ("pl/train",))
    assert "do not say: --documents reads both" in run("diff", first, tmp_path / "b").stdout
    assert "they differ in pl/train." in run("diff", first, tmp_path / "b", "--documents").stdout
    # Nor does it help that the other one was repacked too.
    assert _quick(_repacked(first, 16), _repacked(tmp_path / "b", 16)).by == "totals"


def test_documents_are_compared_without_rows_units_and_order(tmp_path: Path, corpus: Corpus, first: Path) -> None:
    moved = corpus["u00000"]["en"]["train"]
    ordinal = next(iter(moved))
    corpus["u00001"]["en"]["train"][999] = moved.pop(ordinal)
    write_folder(tmp_path / "b", corpus, 48)
    assert _read(first, tmp_path / "b") == Sameness(True, "digest")
    told = run("diff", first, tmp_path / "b", "--documents")
    assert "The documents are the same in every source and split" in told.stdout
    # One document twice in the place of another is not the same.
    corpus["u00001"]["en"]["train"][999] = next(iter(corpus["u00001"]["en"]["train"].values()))
    write_folder(tmp_path / "c", corpus, 48)
    assert _read(first, tmp_path / "c").differing == ("en/train",)


def test_a_document_that_stands_twice_counts_twice(tmp_path: Path, corpus: Corpus) -> None:
    documents = corpus["u00000"]["en"]["train"]
    first, second, *_ = documents
    one, other = documents[first], documents[second]
    for name, ids in (("a", one), ("b", other)):
        documents |= {1000: ids, 1001: ids}
        write_folder(tmp_path / name, corpus, 32)
    assert _read(tmp_path / "a", tmp_path / "b").differing == ("en/train",)


def test_other_totals_and_sources_are_named(tmp_path: Path, corpus: Corpus, first: Path) -> None:
    for unit in corpus.values():
        unit["de"] = unit.pop("pl")
    write_folder(tmp_path / "b", corpus, 32)
    expected = ("de/eval", "de/train", "pl/eval", "pl/train")
    assert _quick(first, tmp_path / "b") == Sameness(False, "totals", expected)
    assert _read(first, tmp_path / "b") == Sameness(False, "digest", expected)


def test_ids_of_other_tokenizers_are_not_compared(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = load_manifest(first)
    other = replace(manifest, tokenizer_sha256="ef" * 32)
    assert compare_manifests((first, first), (manifest, other)) == Sameness(None, "tokenizer")
    manifests: list[DatasetManifest] = [manifest, other, manifest, other]
    monkeypatch.setattr("rxt_dist.data.manifest.load_manifest", lambda root: manifests.pop())
    monkeypatch.setattr("rxt_dist.data.dialogues.load_any_manifest", lambda root: manifests.pop())
    assert isinstance(run("diff", first, first, "--documents").exception, ConfigError)


def test_damage_is_not_compared(first: Path) -> None:
    out = _repacked(first, 64)
    shard = next((out / "en/train").glob("*.arrow"))
    content = bytearray(shard.read_bytes())
    content[load_manifest(out).sources[0].train.shards[0].batches[0].tokens + 3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="does not match its checksum"):
        _read(first, out)
    spec = json.loads((out / "build.json").read_text())
    (out / "build.json").write_text(json.dumps(spec | {"repacked_from": "ab" * 32}))
    with pytest.raises(DataError, match=r"build\.json is not what the dataset was made with"):
        _quick(first, out)
