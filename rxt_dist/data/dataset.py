"""Random access to the rows of a dataset, by byte offset.

A row is a slice of a memory map, at an offset that the manifest states; Arrow is not involved, because reading one of
its record batches makes the system fetch the whole file. Nothing is loaded at opening but the manifest. Arrow has no
checksum, so every shard is hashed once, when its first row is asked for, and a damaged one is refused by name.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rxt_dist.data.format import (
    TOKENIZER_FILE,
    BatchInfo,
    DatasetManifest,
    ShardInfo,
    SourceInfo,
    blake3_file,
    load_manifest,
    tokenizer_fingerprint,
)
from rxt_dist.data.sampler import OrderSource
from rxt_dist.errors import ConfigError, DataError

_REPAIR = "Delete the file and run the same `rxt-dist data build` again: it rebuilds exactly the units that miss one."


@dataclass(frozen=True)
class RawRows:
    """N rows as stored: `tokens_NT` uint16 [N, T], `seg_count_N` int64 [N], `seg_len_S` int64 [S] in row order."""

    tokens_NT: npt.NDArray[np.uint16]
    seg_count_N: npt.NDArray[np.int64]
    seg_len_S: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """One piece of a document in a row: its length, its document's ordinal in the unit, its offset in the document."""

    length: int
    document: int
    offset: int


class _Batch:
    """Views of one record batch's buffers in the shard's memory map."""

    def __init__(self, whole: npt.NDArray[np.uint8], info: BatchInfo, seq_len: int) -> None:
        def view(offset: int, dtype: str, count: int) -> npt.NDArray[np.generic]:
            return np.frombuffer(whole, dtype=dtype, count=count, offset=offset)

        self.tokens = view(info.tokens, "<u2", info.rows * seq_len).reshape(info.rows, seq_len)
        self.bounds = view(info.seg_len_offsets, "<i8", info.rows + 1)
        segments = int(self.bounds[-1])
        self.seg_len = view(info.seg_len, "<u2", segments)
        self.seg_doc = view(info.seg_doc, "<u4", segments)
        self.seg_off = view(info.seg_off, "<u4", segments)


class _Shard:
    """One verified, mapped shard."""

    def __init__(self, path: Path, info: ShardInfo, seq_len: int) -> None:
        problem = shard_problem(path, info)
        if problem:
            raise DataError(f"Shard {path} {problem}. {_REPAIR}")
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # Rows are asked for in random order: reading ahead would fetch megabytes to use kilobytes.
        mapped.madvise(mmap.MADV_RANDOM)
        whole = np.frombuffer(mapped, dtype=np.uint8)
        self._batches = [_Batch(whole, batch, seq_len) for batch in info.batches]
        self._ends = np.cumsum([batch.rows for batch in info.batches])

    def locate(self, row: int) -> tuple[_Batch, int]:
        index = int(np.searchsorted(self._ends, row, side="right"))
        return self._batches[index], row - (int(self._ends[index - 1]) if index else 0)


class _Split:
    """The shards of one source and split, opened when first used."""

    def __init__(self, root: Path, shards: tuple[ShardInfo, ...], seq_len: int) -> None:
        self._root, self._infos, self._seq_len = root, shards, seq_len
        self._shards: dict[int, _Shard] = {}
        self._ends = np.cumsum([shard.rows for shard in shards], dtype=np.int64)

    @property
    def rows(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, row: int) -> tuple[_Batch, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        index = int(np.searchsorted(self._ends, row, side="right"))
        if index not in self._shards:
            info = self._infos[index]
            self._shards[index] = _Shard(self._root / info.file, info, self._seq_len)
        return self._shards[index].locate(row - (int(self._ends[index - 1]) if index else 0))


class TokenDataset:
    """An open dataset. Shards are verified at their first use; several threads may read.

    Args:
        root: the folder that `rxt-dist data build` made.
        tokenizer_sha256: fingerprint of the tokenizer that the caller uses, if it has one.

    Raises:
        DataError: no dataset there, a shard missing or of the wrong size, another tokenizer.
    """

    def __init__(self, root: Path, tokenizer_sha256: str | None = None) -> None:
        self.root = root
        self.manifest: DatasetManifest = load_manifest(root)
        self.seq_len = self.manifest.seq_len
        if tokenizer_sha256 is not None and tokenizer_sha256 != self.manifest.tokenizer_sha256:
            raise DataError(
                f"{root} was made with tokenizer {self.manifest.tokenizer_sha256[:16]}..., but the run uses tokenizer "
                f"{tokenizer_sha256[:16]}...: every id would mean something else. Use {root / TOKENIZER_FILE}, or "
                f"build the data again with the other tokenizer."
            )
        for shard in self.manifest.shards():
            problem = size_problem(root / shard.file, shard)
            if problem:
                raise DataError(f"Shard {root / shard.file} {problem}. {_REPAIR}")
        self._splits = {
            (index, name): _Split(root, source.split(name).shards, self.seq_len)
            for index, source in enumerate(self.manifest.sources)
            for name in ("train", "eval")
        }

    @property
    def digest(self) -> str:
        """The root digest: equal for equal token streams."""
        return self.manifest.root_digest

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """The sources; a source index anywhere in this package is an index into this tuple."""
        return self.manifest.sources

    def order_sources(self) -> tuple[OrderSource, ...]:
        """What `GlobalOrder` needs to know of the sources."""
        return tuple(OrderSource(source.name, source.train.totals.rows) for source in self.sources)

    def source_index(self, name: str) -> int:
        """Index of a source by name.

        Raises:
            ConfigError: no such source; the message lists them.
        """
        names = [source.name for source in self.sources]
        if name not in names:
            raise ConfigError(f"{self.root} has no source '{name}'; it has {names}.")
        return names.index(name)

    def rows(self, source: int, split: str) -> int:
        """Number of rows of a source (by index) in a split ("train" or "eval")."""
        return self._splits[source, split].rows

    def read(self, split: str, source_N: npt.NDArray[np.int64], row_N: npt.NDArray[np.int64]) -> RawRows:
        """Copy N rows out of the shards: about 3 us a row from a cached file.

        Raises:
            DataError: a row's shard is damaged.
        """
        tokens_NT = np.empty((len(row_N), self.seq_len), dtype=np.uint16)
        seg_count_N = np.empty(len(row_N), dtype=np.int64)
        lengths = []
        for at, (source, row) in enumerate(zip(source_N.tolist(), row_N.tolist(), strict=True)):
            batch, local = self._splits[source, split].locate(row)
            tokens_NT[at] = batch.tokens[local]
            start, stop = batch.bounds[local : local + 2].tolist()
            lengths.append(batch.seg_len[start:stop])
            seg_count_N[at] = stop - start
        seg_len_S = np.concatenate(lengths).astype(np.int64) if lengths else np.empty(0, dtype=np.int64)
        return RawRows(tokens_NT, seg_count_N, seg_len_S)

    def segments(self, split: str, source: int, row: int) -> list[Segment]:
        """The document pieces of one row, in order."""
        batch, local = self._splits[source, split].locate(row)
        start, stop = batch.bounds[local : local + 2].tolist()
        columns = (batch.seg_len, batch.seg_doc, batch.seg_off)
        return [Segment(*values) for values in zip(*(column[start:stop].tolist() for column in columns), strict=True)]


def size_problem(path: Path, info: ShardInfo) -> str | None:
    """What a look at the directory says is wrong with a shard, or None."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    return None if size == info.bytes else f"has {size:,} bytes instead of {info.bytes:,} (truncated or overwritten)"


def shard_problem(path: Path, info: ShardInfo) -> str | None:
    """What is wrong with a shard's size or content, or None. Reads the whole file, at 1-3 GB/s when it is cached."""
    problem = size_problem(path, info)
    if problem is None and blake3_file(path) != info.blake3:
        return "does not have the content its manifest states (blake3 differs: a flipped bit or another file)"
    return problem


def verify_dataset(root: Path, on_shard: Callable[[ShardInfo], None]) -> list[tuple[str, str]]:
    """Hash every file of a dataset; return (file, problem) for each damaged one.

    Raises:
        DataError: the manifest itself cannot be used.
    """
    manifest = load_manifest(root)
    damaged = []
    tokenizer = root / TOKENIZER_FILE
    try:
        if tokenizer_fingerprint(tokenizer.read_text()) != manifest.tokenizer_sha256:
            damaged.append((TOKENIZER_FILE, "is not the tokenizer that made the shards"))
    except FileNotFoundError:
        damaged.append((TOKENIZER_FILE, "is missing"))
    except (ValueError, KeyError, TypeError):
        damaged.append((TOKENIZER_FILE, "is not a tokenizer file"))
    for shard in manifest.shards():
        problem = shard_problem(root / shard.file, shard)
        if problem:
            damaged.append((shard.file, problem))
        on_shard(shard)
    return damaged
