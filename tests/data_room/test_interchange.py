"""Shards are plain Arrow files: other libraries open them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.dialogues import DialogueWriter, dialogue_metadata
from rxt_dist.data.interactions import ANSWER_ID, QUERY_ID, check_interaction_rows
from rxt_dist.data.packing import pack
from rxt_dist.data.rows import INTERACTION_BOUNDARIES
from rxt_dist.data.writer import ShardSpec, ShardWriter


def _load(files: Any, cache: Path, split: str | None = "train") -> Any:
    # A second of imports, which other processes that read this file do not need.
    import datasets

    return datasets.load_dataset("arrow", split=split, data_files=files, cache_dir=str(cache))


def test_datasets_and_pyarrow_read_the_rows_that_training_reads(dataset_dir: Path, tmp_path: Path) -> None:
    opened = TokenDataset(dataset_dir)
    shard = opened.manifest.sources[0].train.shards[0]
    tokens = opened.read("train", np.zeros(3, np.int64), np.arange(3)).tokens_RT
    of_datasets = _load(str(dataset_dir / shard.file), tmp_path)
    assert of_datasets[:3]["tokens"] == tokens.tolist()
    assert of_datasets.column_names == ["tokens", "seg_len", "seg_doc", "seg_off"]
    with pa.memory_map(str(dataset_dir / shard.file)) as source:
        table = pa.ipc.open_file(source).read_all()
    assert table.num_rows == shard.rows
    assert table["tokens"][:3].to_pylist() == tokens.tolist()


def test_datasets_reads_the_shards_of_all_sources_together(dataset_dir: Path, tmp_path: Path) -> None:
    opened = TokenDataset(dataset_dir)
    files = {source.name: [str(dataset_dir / shard.file) for shard in source.train.shards] for source in opened.sources}
    loaded = _load(files, tmp_path, None)
    rows = {source.name: source.train.totals.rows for source in opened.sources}
    assert {name: split.num_rows for name, split in loaded.items()} == rows
    segments = {name: sum(len(row) for row in split["seg_doc"]) for name, split in loaded.items()}
    assert all(segments[source.name] >= source.train.totals.documents for source in opened.sources)


def test_datasets_reads_interactions(tmp_path: Path) -> None:
    spec = ShardSpec(16, 65_536, "ab", 1, "cd", INTERACTION_BOUNDARIES)
    writer = ShardWriter(tmp_path, "en/train", "u00000", spec, check_interaction_rows)
    items = [[QUERY_ID, 20 + n, ANSWER_ID, 65_535 - n] for n in range(9)]
    rows = pack([np.array(item, dtype=np.uint16) for item in items], list(range(9)), 16)
    writer.add(rows)
    (shard,) = writer.finish()
    loaded = _load(str(tmp_path / shard.file), tmp_path / "cache")
    assert loaded["tokens"][:] == rows.tokens_RT.tolist()
    with pa.memory_map(str(tmp_path / shard.file)) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    assert metadata[b"rxt.boundaries"] == b"interactions"


def test_datasets_reads_dialogues_turn_by_turn(tmp_path: Path) -> None:
    writer = DialogueWriter(tmp_path, "en/train", "u00000", 65_536, dialogue_metadata(64, "ab", "beta", "cd"))
    turns = [[2, QUERY_ID, 20, 21, ANSWER_ID, 65_535, 3], [2, QUERY_ID, 22, ANSWER_ID, 3]]
    for dialogue in (turns, turns[1:]):
        writer.add([np.array(turn, dtype=np.uint16) for turn in dialogue])
    (shard,) = writer.finish()
    loaded = _load(str(tmp_path / shard.file), tmp_path / "cache")
    assert loaded[:] == {"tokens": [turns[0] + turns[1], turns[1]], "turn_len": [[7, 5], [5]]}
    with pa.memory_map(str(tmp_path / shard.file)) as source:
        metadata = pa.ipc.open_file(source).schema.metadata
    assert json.loads(metadata[b"rxt.special_tokens"])["[U]"] == 9
    assert metadata[b"rxt.format"] == b"rxt-dialogues"


def test_reading_interactions_and_dialogues_needs_no_torch() -> None:
    """Neither does building them; only megatron-core does, inside the function that opens its files."""
    rooms = ("rxt_dist.data.dialogues", "data_prep.interactions.build")
    modules = ", ".join([*rooms, "data_prep.megatron.importing", "data_prep.megatron.exporting"])
    code = f"import sys, {modules}; print([n for n in ('torch', 'deepspeed', 'megatron') if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == "[]"
