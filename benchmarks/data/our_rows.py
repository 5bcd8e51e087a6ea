"""Our side of random_rows.py: shuffled, mixed batches of int64 tokens from a dataset of three sources.

    python benchmarks/data/our_rows.py ROOT [--seq-len 8192] [--batches 240]

Each row is checked against its checksum. CPU time a batch:

- tokens_us: order, reading and a new int64 tensor: the tokens alone, which is what most peers give.
- documents_us: with the bounds of documents, which stand beside the tokens.
- consumer_us, process_us: batches as training takes them (16-bit ids and bounds, from the thread that reads ahead): the
  CPU time of the thread that trains, and of the whole process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np
import torch
from cost import cpu_per_call
from synthetic import write_dataset

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import BatchReader, prefetch
from rxt_dist.data.sampler import GlobalOrder, Phase, integer_weights

TOKENS = 1 << 27  # in all sources together, as peers_rows.py
WEIGHTS = (0.5, 0.3, 0.2)
BATCH_ROWS = 8
SEED = 7


def open_dataset(root: Path, seq_len: int) -> TokenDataset:
    """The dataset of this row length, written on first use, and read once to have it in the page cache."""
    folder = root / f"ours-{seq_len}"
    if not (folder / "dataset.json").exists():
        rows = TOKENS // len(WEIGHTS) // seq_len
        write_dataset(folder, dict.fromkeys(("a", "b", "c"), rows), seq_len)
    for path in folder.rglob("*.*"):
        path.read_bytes()
    return TokenDataset(folder)


def measure(root: Path, seq_len: int, batches: int) -> dict[str, float]:
    """The figures that the module describes."""
    dataset = open_dataset(root, seq_len)
    phases = [Phase(10**12, integer_weights(WEIGHTS))]
    order = GlobalOrder(dataset.order_sources(), phases, SEED, seq_len, max_epochs=float("inf"))
    reader = BatchReader(dataset, order)
    steps = itertools.count()
    narrow_BT = np.empty((BATCH_ROWS, seq_len), dtype=np.uint16)

    def positions() -> np.ndarray:
        start = next(steps) * BATCH_ROWS
        return np.arange(start, start + BATCH_ROWS)

    def tokens() -> torch.Tensor:
        dataset.read("train", *order.rows(positions()), into=narrow_BT)
        return torch.from_numpy(narrow_BT.astype(np.int64))

    def documents() -> torch.Tensor:
        return torch.from_numpy(reader.read(positions()).tokens_BT.numpy().view(np.uint16).astype(np.int64))

    result = {}
    for work in (tokens, documents):
        assert work().shape == (BATCH_ROWS, seq_len)
        cpu_s = cpu_per_call(work, batches)
        result[f"{work.__name__}_us"] = cpu_s * 1e6
        result[f"{work.__name__}_mtok_per_cpu_s"] = BATCH_ROWS * seq_len / cpu_s / 1e6
    with prefetch(reader.read, (positions() for _ in itertools.repeat(None))) as ready:
        result["process_us"] = cpu_per_call(lambda: next(ready), batches) * 1e6
        result["consumer_us"] = cpu_per_call(lambda: next(ready), batches, time.thread_time) * 1e6
    return result


def main() -> None:
    """Parse the arguments, write the dataset, read, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder for the files of all sides")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens a row (default 8192)")
    parser.add_argument("--batches", type=int, default=240, help="batches in each of five blocks (default 240)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(arguments.root, arguments.seq_len, arguments.batches)))


if __name__ == "__main__":
    main()
