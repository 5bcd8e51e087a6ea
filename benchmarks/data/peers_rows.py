"""The peers' side of random_rows.py: shuffled, mixed batches of int64 tokens from files of their own formats.

    python benchmarks/data/peers_rows.py PEER ROOT [--seq-len 8192] [--batches 240]

Three sources of equal size are mixed 5 : 3 : 2 by what each library has for it; all read in the process itself, without
workers, from the page cache. Tokens are stored in 16 bits where the format allows. The files are written on first use.

- datatrove: a DatatroveFolderDataset a source; it has no sampler, so the order is drawn beforehand with numpy. With
  `-documents` also the positions within documents, which it finds by looking for EOS.
- datasets: shuffled and interleaved, in the formats numpy and torch (`datasets-torch`), eight rows at once.
- litdata: StreamingDataset with TokensLoader, CombinedStreamingDataset, StreamingDataLoader.
- mosaicml: one StreamingDataset over streams with proportions, and its StreamingDataLoader.
- olmo: NumpyFSLDatasetMixture and NumpyFSLDataLoader; with `-documents` also the lengths of documents.
- megatron: GPTDataset and BlendedDataset, collated by torch; a sample also has labels, loss mask and positions.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import itertools
import json
import logging
import shutil
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cost import cpu_per_call, peak_mb

TOKENS = 1 << 27  # in all sources together
WEIGHTS = (0.5, 0.3, 0.2)
VOCABULARY, EOS = 65_536, 3
BATCH_ROWS = 8
SEED = 7

Rows = np.ndarray[Any, np.dtype[np.uint16]]


def source_tokens(source: int, seq_len: int) -> Rows:
    """Random ids of one source, uint16 [R, T]; every thousandth or so is EOS, which ends a document."""
    rows = TOKENS // len(WEIGHTS) // seq_len
    rng = np.random.default_rng(source)
    tokens = rng.integers(16, VOCABULARY, (rows, seq_len), dtype=np.uint16)
    tokens.reshape(-1)[rng.integers(0, tokens.size, tokens.size // 1000)] = EOS
    return tokens


def _folders(root: Path, seq_len: int, write: Callable[[Path, Rows], object]) -> list[Path]:
    """A folder for each source, written on first use, and read once to have it in the page cache."""
    folders = []
    for source in range(len(WEIGHTS)):
        folder = root / f"{seq_len}-{source}"
        if not (folder.parent / f"{folder.name}.complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write(folder, source_tokens(source, seq_len))
            (folder.parent / f"{folder.name}.complete").touch()
        for path in folder.rglob("*"):
            if path.is_file():
                path.read_bytes()
        folders.append(folder)
    return folders


def _shuffled_mix(lengths: list[int]) -> Iterator[tuple[int, int]]:
    """(source, row) in random order: what a sampler in numpy would give, drawn before the clock starts."""
    rng = np.random.default_rng(SEED)
    orders = [rng.permutation(length).tolist() for length in lengths]
    sources = rng.choice(len(WEIGHTS), sum(lengths), p=WEIGHTS).tolist()
    taken = [0] * len(WEIGHTS)
    mixed = []
    for source in sources:
        if taken[source] == lengths[source]:
            break
        mixed.append((source, orders[source][taken[source]]))
        taken[source] += 1
    return iter(mixed)


def read_datatrove(root: Path, seq_len: int, documents: bool = False) -> Iterator[torch.Tensor]:
    from datatrove.utils.dataset import DatatroveFolderDataset

    folders = _folders(root, seq_len, lambda folder, rows: rows.tofile(folder / "00000.ds"))
    # It reads one token more than asked for.
    ask = {"return_positions": documents, "positions_from_eos_token_id": EOS if documents else None}
    sources = [DatatroveFolderDataset(str(folder), seq_len - 1, **ask) for folder in folders]
    order = _shuffled_mix([len(source) for source in sources])
    while True:
        batch = list(itertools.islice(order, BATCH_ROWS))
        items = [sources[source][row] for source, row in batch]
        if documents:
            torch.stack([item["positions"] for item in items])
        yield torch.stack([item["input_ids"] for item in items])


def read_datasets(root: Path, seq_len: int, form: str = "numpy") -> Iterator[torch.Tensor]:
    import datasets

    datasets.disable_progress_bars()

    def write(folder: Path, rows: Rows) -> None:
        feature = datasets.List(datasets.Value("uint16"), length=seq_len)
        features = datasets.Features({"input_ids": feature})
        data = datasets.Dataset.from_dict({"input_ids": list(rows)}, features=features)
        data.save_to_disk(str(folder / "rows"))

    folders = _folders(root, seq_len, write)
    sources = [datasets.load_from_disk(str(folder / "rows")).shuffle(seed=SEED) for folder in folders]
    mixed = datasets.interleave_datasets(sources, probabilities=list(WEIGHTS), seed=SEED).with_format(form)
    for start in itertools.count(0, BATCH_ROWS):
        rows = mixed[start : start + BATCH_ROWS]["input_ids"]
        yield torch.from_numpy(rows.astype(np.int64)) if form == "numpy" else rows.to(torch.int64)


def _same(array: Any) -> Any:
    return array


def read_litdata(root: Path, seq_len: int) -> Iterator[torch.Tensor]:
    import litdata

    def write(folder: Path, rows: Rows) -> None:
        parts = np.array_split(rows.reshape(-1), 64)
        chunk = (8 << 20) // seq_len * seq_len
        litdata.optimize(_same, parts, str(folder), chunk_size=chunk, num_workers=1, item_loader=litdata.TokensLoader())

    folders = _folders(root, seq_len, write)
    sources = [
        litdata.StreamingDataset(
            str(folder), item_loader=litdata.TokensLoader(block_size=seq_len), shuffle=True, drop_last=True, seed=SEED
        )
        for folder in folders
    ]
    mixed = litdata.CombinedStreamingDataset(sources, seed=SEED, weights=list(WEIGHTS), iterate_over_all=False)
    for batch in litdata.StreamingDataLoader(mixed, batch_size=BATCH_ROWS, num_workers=0):
        yield batch.to(torch.int64)


def read_mosaicml(root: Path, seq_len: int) -> Iterator[torch.Tensor]:
    # Its image datasets import torchvision, which has no build for this torch without CUDA; nothing here uses them.
    for name in ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"):
        stand_in: Any = types.ModuleType(name)
        stand_in.__spec__ = importlib.machinery.ModuleSpec(name, None)
        stand_in.VisionDataset = stand_in.to_tensor = object
        sys.modules[name] = stand_in
    import streaming

    def write(folder: Path, rows: Rows) -> None:
        with streaming.MDSWriter(columns={"tokens": f"ndarray:uint16:{seq_len}"}, out=str(folder / "mds")) as writer:
            for row in rows:
                writer.write({"tokens": row})

    def widen(samples: list[dict[str, Any]]) -> torch.Tensor:
        return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))

    folders = _folders(root, seq_len, write)
    streaming.base.util.clean_stale_shared_memory()
    streams = [
        streaming.Stream(local=str(folder / "mds"), proportion=weight)
        for folder, weight in zip(folders, WEIGHTS, strict=True)
    ]
    mixed = streaming.StreamingDataset(
        streams=streams, shuffle=True, shuffle_seed=SEED, batch_size=BATCH_ROWS, num_canonical_nodes=1
    )
    yield from streaming.StreamingDataLoader(mixed, batch_size=BATCH_ROWS, collate_fn=widen)


def read_olmo(root: Path, seq_len: int, documents: bool = False) -> Iterator[torch.Tensor]:
    from olmo_core.data import DataCollator, NumpyDataLoaderBase
    from olmo_core.data.numpy_dataset import NumpyFSLDatasetMixture

    folders = _folders(root, seq_len, lambda folder, rows: rows.tofile(folder / "tokens.npy"))
    paths = [str(folder / "tokens.npy") for folder in folders]
    largest = TOKENS // len(WEIGHTS) // seq_len * seq_len
    wanted = {
        (path, at): int(largest * w / max(WEIGHTS)) for at, (path, w) in enumerate(zip(paths, WEIGHTS, strict=True))
    }
    mixed = NumpyFSLDatasetMixture(
        *paths,
        path_offset_index=wanted,
        seed=SEED,
        sequence_length=seq_len,
        pad_token_id=0,
        eos_token_id=EOS,
        vocab_size=VOCABULARY,
        dtype=np.uint16,
        generate_doc_lengths=documents,
    )
    mixed.work_dir = root / f"work-{seq_len}"
    mixed.prepare()
    loader = NumpyDataLoaderBase.wrap_numpy_dataset(
        mixed,
        global_batch_size=BATCH_ROWS * seq_len,
        collator=DataCollator(pad_token_id=0),
        work_dir=mixed.work_dir,
        seed=SEED,
        num_threads=0,  # its default of four threads takes more CPU time
    )
    loader.reshuffle(epoch=1)
    for batch in loader:
        yield batch["input_ids"]


def read_megatron(root: Path, seq_len: int) -> Iterator[torch.Tensor]:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(folder: Path, rows: Rows) -> None:
        builder = IndexedDatasetBuilder(str(folder / "text.bin"), dtype=np.uint16)
        flat = rows.reshape(-1)
        for document in np.split(flat, np.flatnonzero(flat == EOS) + 1):
            if len(document):
                builder.add_document(document, [len(document)])
        builder.finalize(str(folder / "text.idx"))

    folders = _folders(root, seq_len, write)
    tokenizer: Any = types.SimpleNamespace(vocab_size=VOCABULARY, eod=EOS, unique_identifiers={"kind": "random ids"})
    config = GPTDatasetConfig(
        random_seed=SEED,
        sequence_length=seq_len,
        blend_per_split=[([str(folder / "text") for folder in folders], list(WEIGHTS)), None, None],
        path_to_cache=str(root / f"cache-{seq_len}"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    rows = int(TOKENS // len(WEIGHTS) // seq_len / max(WEIGHTS) * 0.9)
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    train, _, _ = BlendedMegatronDatasetBuilder(GPTDataset, [rows, 0, 0], lambda: True, config).build()
    for batch in torch.utils.data.DataLoader(train, batch_size=BATCH_ROWS, num_workers=0):
        yield batch["tokens"]


PEERS: dict[str, Callable[[Path, int], Iterator[torch.Tensor]]] = {
    "datatrove": read_datatrove,
    "datatrove-documents": lambda root, seq_len: read_datatrove(root, seq_len, documents=True),
    "datasets": read_datasets,
    "datasets-torch": lambda root, seq_len: read_datasets(root, seq_len, "torch"),
    "litdata": read_litdata,
    "mosaicml": read_mosaicml,
    "olmo": read_olmo,
    "olmo-documents": lambda root, seq_len: read_olmo(root, seq_len, documents=True),
    "megatron": read_megatron,
}


def main() -> None:
    """Parse the arguments, write the files, read, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("root", type=Path, help="folder for the files of all peers")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens a row (default 8192)")
    parser.add_argument("--batches", type=int, default=240, help="batches in each of five blocks (default 240)")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    batches = PEERS[arguments.peer](arguments.root / arguments.peer.partition("-")[0], arguments.seq_len)
    first = next(batches)
    assert first.dtype == torch.int64, first.dtype
    assert first.shape == (BATCH_ROWS, arguments.seq_len), first.shape
    cpu_s = cpu_per_call(lambda: next(batches), arguments.batches)
    rate = BATCH_ROWS * arguments.seq_len / cpu_s / 1e6
    print(json.dumps({"us_per_batch": cpu_s * 1e6, "mtok_per_cpu_s": rate, "peak_mb": peak_mb()}))


if __name__ == "__main__":
    main()
