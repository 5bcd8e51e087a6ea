"""The peers' side of run_all.py's first batch: opening 745 small files, up to the first 8 rows; in their environment.

    python benchmarks/data/peers_first_batch.py PEER ROOT [--shards 745]

Every file holds 64 rows of 64 tokens, as in first_batch.py, so what is measured is the work a file, not a token.
Megatron's index of samples, which it makes on the first start and which grows with the tokens, is made anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SEQ_LEN, ROWS = 64, 64
VOCABULARY, EOS = 65_536, 3
ROUNDS = 3


def write_files(root: Path, shards: int) -> None:
    """Files that datatrove, OLMo-core and Megatron read as they are, and a dataset of the library `datasets`."""
    import datasets
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(16, VOCABULARY, (ROWS, SEQ_LEN), dtype=np.uint16)
    for shard in range(shards):
        tokens.tofile(root / f"{shard:05d}.ds")
        builder = IndexedDatasetBuilder(str(root / f"{shard:05d}.bin"), dtype=np.uint16)
        for row in tokens:
            builder.add_document(row, [SEQ_LEN])
        builder.finalize(str(root / f"{shard:05d}.idx"))
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"), length=SEQ_LEN)})
    data = datasets.Dataset.from_dict({"input_ids": list(np.tile(tokens, (shards, 1)))}, features=features)
    data.save_to_disk(str(root / "rows"), num_shards=shards)


def first_datatrove(root: Path, seed: int) -> Any:
    from datatrove.utils.dataset import DatatroveFolderDataset

    data = DatatroveFolderDataset(str(root), SEQ_LEN - 1, filename_pattern="*.ds")
    order = np.random.default_rng(seed).permutation(len(data))
    return torch.stack([data[int(row)]["input_ids"] for row in order[:8]])


def first_datasets(root: Path, seed: int) -> Any:
    import datasets

    return datasets.load_from_disk(str(root / "rows")).shuffle(seed=seed).with_format("numpy")[:8]


def first_olmo(root: Path, seed: int) -> Any:
    from olmo_core.data import DataCollator, NumpyDataLoaderBase
    from olmo_core.data.numpy_dataset import NumpyFSLDataset

    data = NumpyFSLDataset(
        *sorted(str(path) for path in root.glob("*.ds")),
        sequence_length=SEQ_LEN,
        pad_token_id=0,
        eos_token_id=EOS,
        vocab_size=VOCABULARY,
        dtype=np.uint16,
    )
    data.work_dir = root / "work"
    data.prepare()
    loader = NumpyDataLoaderBase.wrap_numpy_dataset(
        data, global_batch_size=8 * SEQ_LEN, collator=DataCollator(pad_token_id=0), work_dir=data.work_dir, seed=seed
    )
    loader.reshuffle(epoch=1)
    return next(iter(loader))


def first_megatron(root: Path, seed: int) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    prefixes = sorted(str(path.with_suffix("")) for path in root.glob("*.bin"))
    tokenizer: Any = types.SimpleNamespace(vocab_size=VOCABULARY, eod=EOS, unique_identifiers={"kind": "random ids"})
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=SEQ_LEN,
        blend_per_split=[(prefixes, [1.0] * len(prefixes)), None, None],
        path_to_cache=str(root / f"cache-{seed}-{time.time_ns()}"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [len(prefixes) * ROWS // 2, 0, 0]
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return next(iter(torch.utils.data.DataLoader(train, batch_size=8)))


PEERS: dict[str, Callable[[Path, int], Any]] = {
    "datatrove": first_datatrove,
    "datasets": first_datasets,
    "olmo": first_olmo,
    "megatron": first_megatron,
}


def main() -> None:
    """Parse the arguments, write the files on first use, open them, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("root", type=Path, help="folder for the files of all peers")
    parser.add_argument("--shards", type=int, default=745, help="files (default 745)")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    root = arguments.root / f"first-{arguments.shards}"
    if not (root / "rows" / "dataset_info.json").exists():
        write_files(root, arguments.shards)
    taken = []
    for seed in range(ROUNDS):
        began = time.perf_counter()
        PEERS[arguments.peer](root, seed)
        taken.append(time.perf_counter() - began)  # the first also pays for imports; the median does not
    print(json.dumps({"first_batch_s": statistics.median(taken)}))


if __name__ == "__main__":
    main()
