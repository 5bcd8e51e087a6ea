"""Shards are plain Arrow files: other libraries open them."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from rxt_dist.data.dataset import TokenDataset


def test_datasets_and_pyarrow_read_the_rows_that_training_reads(dataset_dir: Path, tmp_path: Path) -> None:
    opened = TokenDataset(dataset_dir)
    shard = opened.manifest.sources[0].train.shards[0]
    tokens = opened.read("train", np.zeros(3, np.int64), np.arange(3)).tokens_NT
    files = {"data_files": str(dataset_dir / shard.file), "cache_dir": str(tmp_path)}
    of_datasets = datasets.load_dataset("arrow", split="train", **files)
    assert of_datasets[:3]["tokens"] == tokens.tolist()
    with pa.memory_map(str(dataset_dir / shard.file)) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.num_rows == shard.rows
    assert table["tokens"][:3].to_pylist() == tokens.tolist()
