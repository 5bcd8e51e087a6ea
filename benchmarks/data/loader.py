"""CPU time of reading batches in shuffled, mixed order: rows to int64 tokens, and what a training process pays.

    python benchmarks/data/loader.py [--rows 65536] [--seq-len 8192] [--batch-rows 8]

Writes random rows of that length (two sources, mixed 3 to 1) into a scratch directory and reads them once to have them
in the page cache. Figures are CPU time of the process, the median of several rounds, in one thread where not said
otherwise:

- order_us: `GlobalOrder.rows` for one batch.
- read_us: order, copy, row checksums and document bounds of one batch; 16-bit ids, as training reads it.
- int64_us, int64_mtok_s: order, copy, row checksums and widening to int64, in memory that is used again, without
  document bounds: what loaders give that know no documents.
- prefetched_us: read_us with the hand-over, when the reading thread feeds the main thread.
- expand_us: `TokenBatch.unpack`: widening, positions, segments.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from synthetic import write_dataset

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import BatchReader, prefetch
from rxt_dist.data.sampler import GlobalOrder, Phase, integer_weights

ROUNDS = 7


def _median_us(batches: int, work: Callable[[], None]) -> float:
    """Median over the rounds of microseconds of CPU time per batch; `work` handles `batches` of them."""
    taken = []
    for _ in range(ROUNDS):
        began = time.process_time()
        work()
        taken.append((time.process_time() - began) / batches * 1e6)
    return statistics.median(taken)


def measure(dataset_dir: Path, batch_rows: int = 8, batches: int = 500) -> dict[str, float]:
    """The figures that the module describes, in microseconds a batch and millions of tokens a second."""
    dataset = TokenDataset(dataset_dir)
    sources = dataset.order_sources()
    weights = integer_weights([3.0] + [1.0] * (len(sources) - 1))
    order = GlobalOrder(sources, [Phase(10**12, weights)], 7, dataset.seq_len, max_epochs=float("inf"))
    reader = BatchReader(dataset, order)
    narrow_BT = np.empty((batch_rows, dataset.seq_len), dtype=np.uint16)
    wide_BT = np.empty((batch_rows, dataset.seq_len), dtype=np.int64)
    steps = itertools.count()

    def positions(count: int) -> Iterator[np.ndarray]:
        for _ in range(count):
            start = next(steps) * batch_rows
            yield np.arange(start, start + batch_rows)

    def order_only() -> None:
        for wanted in positions(batches):
            order.rows(wanted)

    def read() -> None:
        for wanted in positions(batches):
            reader.read(wanted)

    def widen() -> None:
        for wanted in positions(batches):
            dataset.read("train", *order.rows(wanted), into=narrow_BT)
            np.copyto(wide_BT, narrow_BT)

    def prefetched() -> None:
        with prefetch(reader.read, positions(batches)) as ready:
            for _ in ready:
                pass

    one = reader.read(np.arange(batch_rows))

    def expand() -> None:
        for _ in range(batches):
            one.unpack()

    read()
    int64_us = _median_us(batches, widen)
    return {
        "order_us": _median_us(batches, order_only),
        "read_us": _median_us(batches, read),
        "int64_us": int64_us,
        "int64_mtok_s": batch_rows * dataset.seq_len / int64_us,
        "prefetched_us": _median_us(batches, prefetched),
        "expand_us": _median_us(batches, expand),
    }


def main() -> None:
    """Parse the arguments, write a dataset, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=65_536, help="rows in all (default 65,536: 1 GiB at 8,192)")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens a row (default 8192)")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows a batch (default 8)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_dataset(root, {"en": arguments.rows * 3 // 4, "pl": arguments.rows // 4}, arguments.seq_len)
        for path in root.rglob("*.arrow"):
            path.read_bytes()
        print(json.dumps(measure(root, arguments.batch_rows), indent=2))


if __name__ == "__main__":
    main()
