"""Seconds from opening a dataset of 745 shards (400 billion tokens at 8,192 a row) to its first batch.

    python benchmarks/data/first_batch.py [--shards 745]

The manifest is that of such a dataset, with 16 record batches a shard; the shards themselves are copies of a small one,
since only the rows of the first batch are read. The files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from synthetic import VOCABULARY, documents_of

from rxt_dist.data import writer as shard_writer
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import BatchReader
from rxt_dist.data.manifest import DATASET_FILE, DatasetManifest, SourceInfo, SplitInfo, Totals, sums_file
from rxt_dist.data.packing import PACKING_VERSION, pack
from rxt_dist.data.sampler import GlobalOrder, Phase, integer_weights
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.files import write_json_atomic

SEQ_LEN, BATCH_ROWS, BATCHES = 64, 4, 16
ROUNDS = 5


def write_many_shards(root: Path, shards: int) -> DatasetManifest:
    """A dataset of this many equal shards in one source."""
    spec = ShardSpec(SEQ_LEN, VOCABULARY, "0" * 64, PACKING_VERSION, "0" * 64)
    usual, shard_writer.RECORD_BATCH_ROWS = shard_writer.RECORD_BATCH_ROWS, BATCH_ROWS
    try:
        writer = ShardWriter(root, "en/train", "u00000", spec)
        rows = BATCH_ROWS * BATCHES
        writer.add(pack(documents_of([SEQ_LEN - 2] * rows, 0), list(range(rows)), SEQ_LEN))
        (first,) = writer.finish()
    finally:
        shard_writer.RECORD_BATCH_ROWS = usual
    infos = [first]
    for number in range(1, shards):
        info = replace(first, file=f"en/train/u{number:05d}-000.arrow", first_document=number * 100_000)
        for source, target in ((first.file, info.file), (sums_file(first.file), sums_file(info.file))):
            shutil.copyfile(root / source, root / target)
        infos.append(info)
    totals = Totals(rows=shards * rows, tokens=shards * rows * SEQ_LEN)
    source = SourceInfo("en", "en", SplitInfo(totals, tuple(infos)))
    manifest = DatasetManifest(
        seq_len=SEQ_LEN,
        vocab_size=VOCABULARY,
        tokenizer_sha256="0" * 64,
        spec_hash="0" * 64,
        inputs=(),
        sources=(source,),
        packing_version=PACKING_VERSION,
    )
    write_json_atomic(root / DATASET_FILE, manifest.to_dict())
    return manifest


def measure(root: Path) -> dict[str, float]:
    """Medians, in seconds: opening alone, and opening, order and first batch of 8 rows together."""
    opened, first = [], []
    for seed in range(ROUNDS):
        began = time.perf_counter()
        dataset = TokenDataset(root)
        opened.append(time.perf_counter() - began)
        sources = dataset.order_sources()
        order = GlobalOrder(sources, [Phase(10**9, integer_weights([1]))], seed, SEQ_LEN, max_epochs=float("inf"))
        BatchReader(dataset, order).read(np.arange(8))
        first.append(time.perf_counter() - began)
    return {"open_s": statistics.median(opened), "first_batch_s": statistics.median(first)}


def main() -> None:
    """Parse the arguments, write a dataset, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=745, help="shards of the dataset (default 745)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_many_shards(Path(folder), arguments.shards)
        print(json.dumps(measure(Path(folder)), indent=2))


if __name__ == "__main__":
    main()
