from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxt_dist.data.dataset import TokenDataset, verify_dataset
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
            piece = raw.tokens_NT[row, at : at + segment.length].tolist()
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
    assert raw.tokens_NT[0, :6].tolist() == [2, 65_535, 11, 32_768, 65_535, 3]
    assert raw.tokens_NT.dtype == np.uint16


def test_rows_come_in_the_order_asked(dataset_dir: Path) -> None:
    dataset = TokenDataset(dataset_dir)
    source, row = np.array([2, 0, 1, 0]), np.array([3, 9, 0, 9])
    raw = dataset.read("train", source, row)
    at = 0
    for n, (s, r) in enumerate(zip(source, row, strict=True)):
        one = dataset.read("train", np.array([s]), np.array([r]))
        assert np.array_equal(raw.tokens_NT[n], one.tokens_NT[0])
        assert raw.seg_len_S[at : at + raw.seg_count_N[n]].tolist() == one.seg_len_S.tolist()
        at += int(raw.seg_count_N[n])


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


def test_a_flipped_bit_is_found_before_the_first_row_is_used(dataset_dir: Path) -> None:
    path = dataset_dir / "pl/train/u00000-000.arrow"
    _flip_bit(path, path.stat().st_size // 2)
    dataset = TokenDataset(dataset_dir)
    zero = np.array([0])
    dataset.read("train", zero, zero)  # another shard is not concerned
    with pytest.raises(DataError, match=r"pl/train/u00000-000\.arrow does not have the content"):
        dataset.read("train", zero + 1, zero)


def test_verify_names_every_damaged_file(dataset_dir: Path) -> None:
    _flip_bit(dataset_dir / "en/eval/u00000-000.arrow", 700)
    (dataset_dir / "und/train/u00000-000.arrow").write_bytes(b"short")
    seen: list[str] = []
    damaged = dict(verify_dataset(dataset_dir, lambda shard: seen.append(shard.file)))
    assert set(damaged) == {"tokenizer.json", "en/eval/u00000-000.arrow", "und/train/u00000-000.arrow"}
    assert len(seen) == 6


def test_reading_needs_neither_torch_nor_arrow_batches(dataset_dir: Path) -> None:
    code = (
        "import sys, numpy as np; from pathlib import Path; from rxt_dist.data.dataset import TokenDataset;"
        f"d = TokenDataset(Path({str(dataset_dir)!r})); d.read('train', np.array([0]), np.array([1]));"
        "assert 'torch' not in sys.modules and 'deepspeed' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
