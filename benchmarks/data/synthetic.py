"""Documents of web-like lengths with random ids, and datasets of them: what the data benchmarks measure on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from rxt_dist.data.manifest import DATASET_FILE, DatasetManifest, SourceInfo, SplitInfo, Totals
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS, pack
from rxt_dist.data.rows import SPECIAL_COUNT
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.files import write_json_atomic

VOCABULARY = 65_536
_SIGMA = 1.1


def web_lengths(documents: int, seed: int, mean: float = 1000) -> list[int]:
    """Log-normal lengths in tokens: most documents short, a few longer than a row."""
    mu = np.log(mean) - _SIGMA**2 / 2
    return np.maximum(1, np.random.default_rng(seed).lognormal(mu, _SIGMA, documents)).astype(int).tolist()


def documents_of(lengths: list[int], seed: int) -> list[npt.NDArray[np.uint16]]:
    """Random ids (uint16, none of them special) in documents of these lengths."""
    flat = np.random.default_rng(seed).integers(SPECIAL_COUNT, VOCABULARY, sum(lengths), dtype=np.uint16)
    return np.split(flat, np.cumsum(lengths)[:-1])


def write_dataset(root: Path, sources: dict[str, int], seq_len: int) -> DatasetManifest:
    """A dataset with about the given number of rows in each source, and a few held-out ones."""
    spec = ShardSpec(seq_len, VOCABULARY, "0" * 64, PACKING_VERSION, "0" * 64)
    infos = []
    for number, (name, rows) in enumerate(sources.items()):
        splits = {
            split: _write(root, f"{name}/{split}", spec, wanted, number)
            for split, wanted in (("train", rows), ("eval", 1))
        }
        infos.append(SourceInfo(name, name, splits["train"], splits["eval"]))
    manifest = DatasetManifest(
        seq_len=seq_len,
        vocab_size=VOCABULARY,
        tokenizer_sha256=spec.tokenizer_sha256,
        spec_hash=spec.spec_hash,
        packing_version=PACKING_VERSION,
        inputs=(),
        sources=tuple(infos),
    )
    write_json_atomic(root / DATASET_FILE, manifest.to_dict())
    return manifest


def _write(root: Path, directory: str, spec: ShardSpec, wanted: int, seed: int) -> SplitInfo:
    writer = ShardWriter(root, directory, "u00000", spec)
    rows = tokens = documents = 0
    while rows < wanted:
        lengths = web_lengths(WINDOW_DOCUMENTS, seed=1000 * seed + documents)
        packed = pack(documents_of(lengths, seed), list(range(documents, documents + len(lengths))), spec.seq_len)
        packed = packed.slice(0, min(packed.rows, wanted - rows))
        writer.add(packed)
        rows += packed.rows
        tokens += int(packed.seg_len_I.sum(dtype=np.int64))
        documents += len(lengths)
    return SplitInfo(Totals(documents, tokens, rows, rows * spec.seq_len - tokens), writer.finish())
