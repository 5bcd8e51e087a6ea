from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.manifest import DatasetManifest, SourceInfo, SplitInfo, Totals, load_manifest, sums_file
from rxt_dist.data.packing import PACKING_VERSION, pack
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError


def _flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def _all_documents(dataset: TokenDataset, source: int, split: str) -> dict[int, list[int]]:
    """Documents by ordinal, put together from the segments of every row."""
    rows = np.arange(dataset.rows(source, split))
    raw = dataset.read(split, np.full_like(rows, source), rows)
    found: dict[int, dict[int, list[int]]] = {}
    for row in rows.tolist():
        at = 0
        for segment in dataset.segments(split, source, row):
            piece = raw.tokens_RT[row, at : at + segment.length].tolist()
            assert found.setdefault(segment.document, {}).setdefault(segment.offset, piece) is piece
            at += segment.length
    return {document: [t for offset in sorted(by) for t in by[offset]] for document, by in found.items()}


def test_every_document_comes_back_exactly(dataset_dir: Path, documents: dict[str, Any]) -> None:
    dataset = TokenDataset(dataset_dir)
    assert [source.name for source in dataset.sources] == ["en", "pl", "und"]
    for index, source in enumerate(dataset.sources):
        for split in ("train", "eval"):
            wanted = {n: [2, *ids.tolist(), 3] for n, ids in enumerate(documents[source.name][split])}
            assert _all_documents(dataset, index, split) == wanted


def test_the_last_id_of_16_bits_survives(tmp_path: Path, writer: Callable[..., Any]) -> None:
    ids = np.array([65_535, 11, 32_768, 65_535], dtype=np.uint16)
    writer(tmp_path, {"en": {"train": [ids], "eval": [ids]}})
    raw = TokenDataset(tmp_path).read("train", np.array([0]), np.array([0]))
    assert raw.tokens_RT[0, :6].tolist() == [2, 65_535, 11, 32_768, 65_535, 3]
    assert raw.tokens_RT.dtype == np.uint16


def test_rows_come_in_the_order_asked(dataset_dir: Path) -> None:
    dataset = TokenDataset(dataset_dir)
    source, row = np.array([2, 0, 1, 0]), np.array([3, 9, 0, 9])
    raw = dataset.read("train", source, row)
    at = 0
    for n, (s, r) in enumerate(zip(source, row, strict=True)):
        one = dataset.read("train", np.array([s]), np.array([r]))
        assert np.array_equal(raw.tokens_RT[n], one.tokens_RT[0])
        assert raw.seg_len_I[at : at + raw.seg_count_R[n]].tolist() == one.seg_len_I.tolist()
        at += int(raw.seg_count_R[n])


def test_what_the_caller_expects_is_checked(dataset_dir: Path) -> None:
    TokenDataset(dataset_dir, tokenizer_sha256="ab" * 32)
    with pytest.raises(DataError, match="tokenizer"):
        TokenDataset(dataset_dir, tokenizer_sha256="ef" * 32)
    with pytest.raises(ConfigError, match="no source 'de'"):
        TokenDataset(dataset_dir).source_index("de")


def test_a_missing_or_truncated_shard_is_refused_at_opening(dataset_dir: Path) -> None:
    shard = dataset_dir / "pl/train/u00000-000.arrow"
    content = shard.read_bytes()
    shard.write_bytes(content[:-7])
    with pytest.raises(DataError, match=r"pl/train/u00000-000\.arrow has .* bytes instead"):
        TokenDataset(dataset_dir)
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        TokenDataset(dataset_dir)
    shard.symlink_to(shard)
    with pytest.raises(DataError, match=r"pl/train/u00000-000\.arrow cannot be read \(Too many levels"):
        TokenDataset(dataset_dir)


def test_a_flipped_bit_is_found_before_its_row_is_used(dataset_dir: Path) -> None:
    shard = load_manifest(dataset_dir).sources[1].train.shards[0]
    _flip_bit(dataset_dir / shard.file, shard.batches[0].tokens + 3 * 2 * 32 + 17)
    dataset = TokenDataset(dataset_dir)
    rows = np.arange(dataset.rows(1, "train"))
    dataset.read("train", np.ones(3, dtype=np.int64), rows[:3])  # other rows are not concerned
    dataset.read("train", np.ones(len(rows) - 4, dtype=np.int64), rows[4:])
    message = rf"Row 3 of shard .*{shard.file} does not match its checksum.* `rxt-dist data verify .* --repair`"
    for read in (lambda: dataset.read("train", np.array([1]), rows[3:4]), lambda: dataset.segments("train", 1, 3)):
        with pytest.raises(DataError, match=message):
            read()


def write_many_shards(root: Path, shards: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset of equal shards with 16 record batches each, as many as 400 billion tokens have at 745."""
    monkeypatch.setattr("rxt_dist.data.writer.RECORD_BATCH_ROWS", 2)
    writer = ShardWriter(root, "en/train", "u00000", ShardSpec(32, 65_536, "ab" * 32, PACKING_VERSION, "cd"))
    writer.add(pack([np.full(30, 100 + n, dtype=np.uint16) for n in range(32)], list(range(32)), 32))
    (first,) = writer.finish()
    infos = [dataclasses.replace(first, file=f"en/train/u{n:05d}-000.arrow") for n in range(shards)]
    for info in infos[1:]:
        shutil.copyfile(root / first.file, root / info.file)
        shutil.copyfile(root / sums_file(first.file), root / sums_file(info.file))
    source = SourceInfo("en", "en", SplitInfo(Totals(rows=32 * shards), tuple(infos)))
    manifest = DatasetManifest(
        seq_len=32,
        vocab_size=65_536,
        tokenizer_sha256="ab" * 32,
        spec_hash="cd",
        inputs=(),
        sources=(source,),
        packing_version=PACKING_VERSION,
    )
    (root / "dataset.json").write_text(json.dumps(manifest.to_dict()))


def test_of_745_shards_only_those_are_opened_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What keeps the first batch quick; how quick says benchmarks/data/first_batch.py."""

    def mapped() -> set[str]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {Path(line.split()[-1]).name for line in lines if str(tmp_path) in line and line.endswith(".arrow")}

    write_many_shards(tmp_path, 745, monkeypatch)
    dataset = TokenDataset(tmp_path)
    assert mapped() == set()
    rows = np.append(np.random.default_rng(0).integers(0, 745 * 32, 7), 744 * 32)
    raw = dataset.read("train", np.zeros_like(rows), rows)
    assert mapped() == {f"u{row // 32:05d}-000.arrow" for row in rows.tolist()}
    assert raw.tokens_RT[:, 1].tolist() == (100 + rows % 32).tolist()
    (tmp_path / "en/train/u00700-000.sums").unlink()
    with pytest.raises(DataError, match=r"u00700-000\.sums is missing.*--repair"):
        TokenDataset(tmp_path)


def test_more_shards_than_files_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every map holds an open file: the oldest are given up where the hard limit is reached, and opened again."""
    write_many_shards(tmp_path, 150, monkeypatch)
    code = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, (100, 600));"
        "import numpy as np; from pathlib import Path; from rxt_dist.data.dataset import TokenDataset;"
        "d = TokenDataset(Path(sys.argv[1])); rows = np.tile(np.arange(0, 150 * 32, 8), 2);"
        "raw = d.read('train', np.zeros_like(rows), rows);"
        "assert raw.tokens_RT[:, 1].tolist() == (100 + rows % 32).tolist();"
        "assert 88 <= len(os.listdir('/proc/self/fd')) <= 100, os.listdir('/proc/self/fd')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_reading_needs_neither_torch_nor_arrow_batches(dataset_dir: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from rxt_dist.data.dataset import TokenDataset;"
        f"d = TokenDataset(Path({str(dataset_dir)!r})); d.read('train', np.array([0]), np.array([1]));"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
