"""A small dataset with three sources, written straight through the shard writer (no tokenizer, no text)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rxt_dist.data.manifest import DatasetManifest, SourceInfo, SplitInfo, Totals
from rxt_dist.data.packing import PACKING_VERSION, pack
from rxt_dist.data.writer import ShardSpec, ShardWriter

SEQ_LEN = 32
Documents = list[np.ndarray]


def make_documents(seed: int, count: int, vocab_size: int = 65_536) -> Documents:
    rng = np.random.default_rng(seed)
    return [rng.integers(11, vocab_size, rng.integers(1, 80)).astype(np.uint16) for _ in range(count)]


def write_dataset(root: Path, documents: dict[str, dict[str, Documents]], vocab_size: int = 65_536) -> DatasetManifest:
    """Write {source: {split: documents}} as a dataset of rows of 32 tokens."""
    spec = ShardSpec(SEQ_LEN, vocab_size, "ab" * 32, PACKING_VERSION, "cd" * 32)
    sources = []
    for name, splits in documents.items():
        infos = {}
        for split, items in splits.items():
            writer = ShardWriter(root, f"{name}/{split}", "u00000", spec)
            rows = pack(items, list(range(len(items))), SEQ_LEN)
            writer.add(rows)
            tokens = sum(len(ids) + 2 for ids in items)
            totals = Totals(len(items), tokens, rows.rows, rows.rows * SEQ_LEN - tokens)
            infos[split] = SplitInfo(totals, writer.finish())
        sources.append(SourceInfo(name, name, infos["train"], infos["eval"]))
    manifest = DatasetManifest(
        seq_len=SEQ_LEN,
        vocab_size=vocab_size,
        tokenizer_sha256="ab" * 32,
        spec_hash="cd" * 32,
        inputs=(),
        sources=tuple(sorted(sources, key=lambda s: s.name)),
        packing_version=PACKING_VERSION,
    )
    (root / "dataset.json").write_text(json.dumps(manifest.to_dict()))
    return manifest


@pytest.fixture
def documents() -> dict[str, dict[str, Documents]]:
    return {
        name: {"train": make_documents(seed, count), "eval": make_documents(seed + 100, 5)}
        for seed, (name, count) in enumerate({"en": 300, "pl": 200, "und": 40}.items())
    }


@pytest.fixture
def dataset_dir(tmp_path: Path, documents: dict[str, dict[str, Documents]]) -> Path:
    write_dataset(tmp_path / "data", documents)
    return tmp_path / "data"


@pytest.fixture
def writer() -> Callable[..., DatasetManifest]:
    return write_dataset
