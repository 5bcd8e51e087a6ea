from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from shard_folder import VOCABULARY, Corpus, random_corpus, write_folder

from data_prep.shards import statistics as module
from data_prep.shards.plots import draw_statistics
from data_prep.shards.statistics import Scan, scan_dataset, statistics
from rxt_dist.errors import DataError


def _documents(corpus: Corpus, source: str, split: str) -> list[list[int]]:
    return [[2, *ids.tolist(), 3] for unit in corpus.values() for ids in unit[source][split].values()]


def _same(first: Scan, second: Scan) -> bool:
    return all(np.array_equal(np.sort(getattr(first, n)), np.sort(getattr(second, n))) for n in ("lengths", "hashes"))


@pytest.fixture
def corpus() -> Corpus:
    """Documents of which some stand twice: short ones, ones cut over several rows, one across splits."""
    made = random_corpus(11, units=2, documents=150)
    first, second = made["u00000"]["en"]["train"], made["u00001"]["en"]["train"]
    long = np.arange(11, 11 + 200, dtype=np.uint16)
    short = np.array([20, 21, 22], dtype=np.uint16)
    first |= {500: long, 501: short, 502: short}
    second |= {500: long, 501: short, 503: long[:-1], 504: long[1:]}
    made["u00000"]["pl"]["train"][500] = long
    made["u00001"]["en"]["eval"][510] = short
    return made


def test_figures_are_those_of_the_documents(tmp_path: Path, corpus: Corpus) -> None:
    manifest = write_folder(tmp_path, corpus, 32)
    scans = scan_dataset(tmp_path, manifest, None, workers=1)
    figures = statistics(manifest, scans, lambda token: f"<{token}>")
    train = {name: _documents(corpus, name, "train") for name in ("en", "pl")}
    for name, documents in train.items():
        scan, source = scans[name, "train"], figures["sources"][name]
        assert sorted(scan.lengths.tolist()) == sorted(len(ids) for ids in documents)
        counts = Counter(token for ids in documents for token in ids)
        assert {i: int(n) for i, n in enumerate(scan.ids) if n} == counts
        repeats = len(documents) - len({tuple(ids) for ids in documents})
        assert source["duplicates"] == {
            "documents": len(documents), "duplicates": repeats, "rate": repeats / len(documents)
        }  # fmt: skip
        assert source["lengths"]["longest"] == 202
        assert sum(source["lengths"]["histogram"].values()) == len(documents)
        assert source["lengths"]["p50"] == np.median([len(ids) for ids in documents])
        short = sum(len(ids) in (4, 5, 6, 7) for ids in documents)
        assert source["lengths"]["histogram"]["4"] == short
    assert figures["sources"]["en"]["duplicates"]["duplicates"] >= 3
    both = train["en"] + train["pl"]
    assert figures["duplicates"]["duplicates"] == len(both) - len({tuple(ids) for ids in both})
    held_out = [tuple(ids) for ids in _documents(corpus, "en", "eval")]
    leaked = sum(ids in {tuple(x) for x in both} for ids in held_out)
    assert figures["sources"]["en"]["held_out_also_in_training"] == leaked > 0
    counts = Counter(token for ids in both for token in ids)
    assert figures["ids"]["unused"] == sum(counts[i] == 0 for i in range(11, VOCABULARY))
    assert figures["ids"]["used_once"] == sum(counts[i] == 1 for i in range(11, VOCABULARY))
    assert [item["count"] for item in figures["ids"]["top"]] == [n for _, n in counts.most_common(module.TOP_IDS)]
    assert figures["ids"]["top"][0]["text"] == f"<{figures['ids']['top'][0]['id']}>"
    assert figures["scanned"] == {
        "rows": manifest.totals.rows, "tokens": manifest.totals.tokens, "whole": True
    }  # fmt: skip
    assert sum(entry["share"] for entry in figures["languages"].values()) == pytest.approx(1)


def test_processes_change_nothing(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = write_folder(tmp_path, corpus, 32)
    here = scan_dataset(tmp_path, manifest, None, workers=1)
    monkeypatch.setattr(module, "_PROCESS_TOKENS", 0)
    seen: list[tuple[int, int]] = []
    there = scan_dataset(tmp_path, manifest, None, 2, lambda done, total: seen.append((done, total)))
    assert all(_same(here[key], there[key]) for key in here)
    assert seen[-1] == (manifest.totals.rows, manifest.totals.rows)


def test_a_document_cut_over_the_end_of_a_shard_is_one_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rxt_dist.data.writer.SHARD_ROWS", 16)
    monkeypatch.setattr("rxt_dist.data.writer.RECORD_BATCH_ROWS", 8)
    long = np.arange(1000, dtype=np.uint16) % 250 + 11
    corpus = {f"u0000{n}": {"en": {"train": {0: long, 1: long[:9]}, "eval": {2: long}}} for n in range(2)}
    manifest = write_folder(tmp_path, corpus, 32)
    assert len(manifest.sources[0].train.shards) > 3
    figures = statistics(manifest, scan_dataset(tmp_path, manifest, None, workers=1), str)
    assert figures["duplicates"] == {"documents": 4, "duplicates": 2, "rate": 0.5}
    assert figures["sources"]["en"]["held_out_also_in_training"] == 2


@pytest.mark.slow
def test_a_sample_is_a_fair_and_repeatable_part(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path, random_corpus(12, units=3, documents=2000, sources=("en",)), 32)
    whole = scan_dataset(tmp_path, manifest, None, workers=1)["en", "train"]
    scans = scan_dataset(tmp_path, manifest, 900, workers=1)
    part = scans["en", "train"]
    assert part.rows == 900 < whole.rows
    assert part.lengths.mean() == pytest.approx(whole.lengths.mean(), rel=0.1)
    assert not statistics(manifest, scans, str)["scanned"]["whole"]
    assert _same(part, scan_dataset(tmp_path, manifest, 900, workers=1)["en", "train"])


@pytest.mark.slow
def test_pictures(tmp_path: Path, corpus: Corpus) -> None:
    manifest = write_folder(tmp_path / "data", corpus, 32)
    scans = scan_dataset(tmp_path / "data", manifest, None, workers=1)
    plan = [{"source": name, "epochs": 1.5} for name in ("en", "pl")]
    paths = draw_statistics(statistics(manifest, scans, str), plan, scans, tmp_path / "figures")
    assert {path.name for path in paths} == {
        f"{n}.png" for n in ("lengths", "sources", "bytes_per_token", "ids", "epochs")
    }
    without = draw_statistics(statistics(manifest, scans, str), None, scans, tmp_path / "others")
    assert [path.name for path in without] == [path.name for path in paths if path.name != "epochs.png"]
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in paths)
    assert all(path.stat().st_size > 8000 for path in paths)


def test_a_damaged_shard_is_named(tmp_path: Path, corpus: Corpus) -> None:
    manifest = write_folder(tmp_path, corpus, 32)
    shard = next(manifest.shards())
    content = bytearray((tmp_path / shard.file).read_bytes())
    content[shard.batches[0].seg_len_offsets + 15] ^= 0x40
    (tmp_path / shard.file).write_bytes(content)
    with pytest.raises(DataError, match=rf"{shard.file}.*verify"):
        scan_dataset(tmp_path, manifest, None, workers=1)
    content[shard.batches[0].seg_len_offsets + 15] ^= 0x40
    content[shard.batches[0].tokens + 2 * 32 * 5 + 7] ^= 0x01
    (tmp_path / shard.file).write_bytes(content)
    with pytest.raises(DataError, match=rf"Row 5 of shard .*{shard.file} does not match its checksum.*verify"):
        scan_dataset(tmp_path, manifest, None, workers=1)
    (tmp_path / shard.file).unlink()
    with pytest.raises(DataError, match="cannot be read"):
        scan_dataset(tmp_path, manifest, None, workers=1)


def test_a_sample_says_nothing_about_duplicates(tmp_path: Path) -> None:
    """Every document stands twice, and each held-out one in the training text of the other source."""
    corpus = random_corpus(13, units=2, documents=400)
    corpus["u00001"] = corpus["u00000"]
    for unit in corpus.values():
        unit["en"]["eval"] = dict(list(unit["pl"]["train"].items())[:20])
    manifest = write_folder(tmp_path, corpus, 32)
    whole = statistics(manifest, scan_dataset(tmp_path, manifest, None, workers=1), str)
    assert whole["duplicates"]["rate"] == pytest.approx(0.5, abs=0.01)
    assert whole["sources"]["en"]["held_out_also_in_training"] == 40
    rows = manifest.sources[0].eval.totals.rows + 5
    part = statistics(manifest, scan_dataset(tmp_path, manifest, rows, workers=1), str)
    assert part["duplicates"] is None
    assert (part["ids"]["unused"], part["ids"]["used_once"]) == (None, None)
    for source in part["sources"].values():
        assert source["duplicates"] is source["held_out_also_in_training"] is None
        assert source["lengths"]["documents"] > 0


@pytest.mark.slow
def test_only_a_few_scans_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a scan 512 KiB are counts of ids; the result keeps one array of them for a source and split."""
    monkeypatch.setattr("rxt_dist.data.writer.SHARD_ROWS", 4)
    monkeypatch.setattr("rxt_dist.data.writer.RECORD_BATCH_ROWS", 4)
    corpus = random_corpus(14, units=2, documents=500, sources=("en",))
    manifest = write_folder(tmp_path, corpus, 32)
    assert len(manifest.sources[0].train.shards) > 100
    scan_dataset(tmp_path, manifest, 8, workers=1)  # what is imported on the way
    tracemalloc.start()
    found = scan_dataset(tmp_path, manifest, None, workers=1)["en", "train"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * found.ids.nbytes
    assert (found.lengths.dtype, found.hashes.dtype) == (np.uint32, np.uint64)
    assert sorted(found.lengths.tolist()) == sorted(len(ids) for ids in _documents(corpus, "en", "train"))
