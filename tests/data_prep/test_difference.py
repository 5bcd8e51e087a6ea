from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from shard_folder import Corpus, random_corpus, write_folder

from data_prep.shards.difference import differences
from rxt_dist.data.manifest import DatasetManifest, ShardInfo


@pytest.fixture
def corpus() -> Corpus:
    return random_corpus(21, units=3, documents=60)


@pytest.fixture
def manifest(tmp_path: Path, corpus: Corpus) -> DatasetManifest:
    return write_folder(tmp_path / "a", corpus, 32)


def _words(first: DatasetManifest, second: DatasetManifest) -> dict[str, tuple[str, str]]:
    return {item.what: (item.first, item.second) for item in differences(first, second)}


def test_the_same_stream_from_another_place_is_the_same(
    tmp_path: Path, corpus: Corpus, manifest: DatasetManifest
) -> None:
    other = write_folder(tmp_path / "b", corpus, 32)
    assert differences(manifest, replace(other, inputs=(), files=())) == []


def test_what_differs_is_said_in_words(tmp_path: Path, corpus: Corpus, manifest: DatasetManifest) -> None:
    longer = _words(manifest, write_folder(tmp_path / "b", corpus, 64))
    assert longer["row length"] == ("32", "64")
    assert {"rows of en/train", "rows of 3 of 3 units of en/train"} <= longer.keys()
    assert not any(what.startswith(("documents", "tokens", "units")) for what in longer)
    tokenizer = _words(manifest, replace(manifest, tokenizer_sha256="ef" * 32))
    assert tokenizer == {"tokenizer": (manifest.tokenizer_sha256[:16], "ef" * 8)}


def test_a_missing_unit_and_a_changed_document_are_found(
    tmp_path: Path, corpus: Corpus, manifest: DatasetManifest
) -> None:
    changed = corpus["u00002"]["pl"]["train"]
    ordinal = next(iter(changed))
    changed[ordinal] = changed[ordinal][::-1] // 2 + 11
    found = _words(manifest, write_folder(tmp_path / "b", corpus, 32))
    assert list(found) == ["rows of 1 of 3 units of pl/train"]
    values = found["rows of 1 of 3 units of pl/train"]
    assert all(value.startswith("u00002; u00002-000 = ") for value in values)
    assert values[0] != values[1]
    del corpus["u00001"]
    found = _words(manifest, write_folder(tmp_path / "c", corpus, 32))
    assert found["units of en/train"] == ("has all", "lacks u00001")
    assert "tokens of en/train" in found


def test_sources_languages_and_order(manifest: DatasetManifest) -> None:
    en, pl = manifest.sources
    assert _words(manifest, replace(manifest, sources=(en,)))["sources"] == ("en, pl", "en")
    renamed = replace(manifest, sources=(replace(en, language="de"), pl))
    assert _words(manifest, renamed) == {"language of en": ("en", "de")}
    turned = replace(manifest, sources=(replace(en, train=replace(en.train, shards=en.train.shards[::-1])), pl))
    assert list(_words(manifest, turned)) == ["order of the units of en/train"]


def test_the_first_shard_that_differs_is_shown(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxt_dist.data.writer.SHARD_ROWS", 8)
    monkeypatch.setattr("rxt_dist.data.writer.RECORD_BATCH_ROWS", 8)
    manifest = write_folder(tmp_path / "c", corpus, 32)
    en = manifest.sources[0]
    mine = [shard for shard in en.train.shards if "u00001" in shard.file]
    assert len(mine) > 2
    changed = [replace(shard, blake3="ab" * 32) if shard is mine[1] else shard for shard in en.train.shards]
    shorter = [shard for shard in en.train.shards if shard is not mine[-1]]
    (values,) = _words(manifest, _with_train(manifest, changed)).values()
    assert values == (f"u00001; u00001-001 = {mine[1].blake3[:16]}...", "u00001; u00001-001 = abababababababab...")
    (values,) = _words(manifest, _with_train(manifest, shorter)).values()
    assert values[1] == "u00001; no more shards"


def _with_train(manifest: DatasetManifest, shards: list[ShardInfo]) -> DatasetManifest:
    en, pl = manifest.sources
    return replace(manifest, sources=(replace(en, train=replace(en.train, shards=tuple(shards))), pl))
