"""The peers' side of packing.py: best-fit packers on given lengths; runs in their environment.

    python benchmarks/data/peers_packing.py olmo|trl LENGTHS.npy

- olmo: InstancePacker assigns all documents at once; it moves no tokens, and its segment tree is made before the clock.
- trl: pack_dataset with "bfd_split" on 16-bit ids, in batches of 4,096 documents in memory; its tokens are moved.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

SEQ_LEN = 8192
WINDOW_DOCUMENTS = 4096
Lengths = np.ndarray[tuple[int], np.dtype[np.int64]]


def olmo(lengths: Lengths) -> tuple[float, int]:
    """CPU seconds and rows."""
    from olmo_core.data.utils import InstancePacker

    # Its callers cut what is longer than a row before they pack.
    pieces = [piece for length in lengths.tolist() for piece in _cut(length)]
    ends = np.cumsum(pieces)
    bounds = np.stack([ends - pieces, ends], axis=1)
    packer = InstancePacker(SEQ_LEN)
    began = time.process_time()
    instances, _, _ = packer.pack_documents(bounds)
    return time.process_time() - began, len(instances)


def _cut(length: int) -> list[int]:
    full, rest = divmod(length, SEQ_LEN)
    return [SEQ_LEN] * full + [rest] * (rest > 0)


def trl(lengths: Lengths) -> tuple[float, int]:
    """CPU seconds and rows."""
    import datasets
    import pyarrow as pa
    from trl import pack_dataset

    datasets.disable_progress_bars()
    datasets.disable_caching()
    ids = np.random.default_rng(0).integers(16, 65_536, int(lengths.sum()), dtype=np.uint16)
    column = pa.ListArray.from_arrays(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), ids)
    data = datasets.Dataset(pa.table({"input_ids": column}))
    keep = {"batch_size": WINDOW_DOCUMENTS, "keep_in_memory": True}
    began = time.process_time()
    packed = pack_dataset(data, SEQ_LEN, "bfd_split", map_kwargs=keep)
    return time.process_time() - began, len(packed)


def main() -> None:
    """Parse the arguments, pack, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=("olmo", "trl"))
    parser.add_argument("lengths", type=Path, help="lengths of documents in tokens, int64")
    arguments = parser.parse_args()
    lengths = np.load(arguments.lengths)
    cpu_s, rows = {"olmo": olmo, "trl": trl}[arguments.peer](lengths)
    tokens = int(lengths.sum())
    print(json.dumps({"mtok_per_cpu_s": tokens / cpu_s / 1e6, "padding": 1 - tokens / (rows * SEQ_LEN)}))


if __name__ == "__main__":
    main()
