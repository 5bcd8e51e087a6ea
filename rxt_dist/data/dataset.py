"""Random access to the rows of a dataset, by byte offset.

A row is a slice of a memory map, at an offset that the manifest states; Arrow is not involved, because reading one of
its record batches makes the system fetch the whole file. Nothing is loaded at opening but the manifest. Every row is
checked against its own checksum when it is read, so a flipped bit anywhere is found before its row is used, no file is
hashed before work starts, and what was sound a day ago is not taken on trust.
"""

from __future__ import annotations

import mmap
import os
import resource
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rxt_dist.data.manifest import (
    SPLITS,
    DatasetManifest,
    RecordBatchInfo,
    ShardInfo,
    SourceInfo,
    load_manifest,
    require_tokenizer,
    sums_file,
)
from rxt_dist.data.rows import row_sum
from rxt_dist.data.sampler import OrderSource
from rxt_dist.data.verify import SUM_BYTES, size_problem, sums_problem
from rxt_dist.errors import ConfigError, DataError

_TOKEN_BYTES = 2
_STAT_THREADS, _STAT_FILES = 16, 64
# Files that a process opens besides shards: sockets, libraries, devices, checkpoints.
_OTHER_FILES = 512


@dataclass(frozen=True)
class RawRows:
    """R rows as stored: `tokens_RT` uint16 [R, T], `seg_count_R` int64 [R], `seg_len_I` int64 [I] in row order."""

    tokens_RT: npt.NDArray[np.uint16]
    seg_count_R: npt.NDArray[np.int64]
    seg_len_I: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """One piece of a document in a row: its length, its document's ordinal in the unit, its offset in the document."""

    length: int
    document: int
    offset: int


class _RecordBatch:
    """Views of one record batch's buffers in the shard's memory map.

    The views of segments reach to the next buffer: how many segments there are is itself read from the file, and is
    right only where a row's checksum says so.
    """

    __slots__ = ("bounds", "seg_doc", "seg_len", "seg_off", "tokens")

    def __init__(self, whole: npt.NDArray[np.uint8], info: RecordBatchInfo, seq_len: int) -> None:
        def view(offset: int, dtype: str, count: int) -> npt.NDArray[Any]:
            return np.frombuffer(whole, dtype=dtype, count=count, offset=offset)

        # A row, or a few numbers, are taken of these at a time: from a memoryview that costs a half to a tenth.
        self.tokens = view(info.tokens, "<u1", info.rows * seq_len * _TOKEN_BYTES).data
        self.bounds = view(info.seg_len_offsets, "<i8", info.rows + 1).data
        segments = (info.seg_doc_offsets - info.seg_len) // 2
        self.seg_len = view(info.seg_len, "<u2", segments).data
        self.seg_doc = view(info.seg_doc, "<u4", min(segments, (info.seg_off_offsets - info.seg_doc) // 4))
        self.seg_off = view(info.seg_off, "<u4", min(segments, (len(whole) - info.seg_off) // 4))


class _Shard:
    """One mapped shard and its row checksums; record batches are looked at when first used."""

    __slots__ = ("_batches", "_ends", "_info", "_root", "_seq_len", "_sums", "_whole")

    def __init__(self, root: Path, info: ShardInfo, seq_len: int) -> None:
        self._root, self._info, self._seq_len = root, info, seq_len
        path, sums = root / info.file, root / sums_file(info.file)
        for name, problem in ((path, size_problem(path, info.bytes)), (sums, sums_problem(sums, info))):
            if problem:
                raise DataError(problem_text(root, f"{name} {problem}"))
        try:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(problem_text(root, f"{path} cannot be read ({error.strerror})")) from error
        # Rows are asked for in random order: reading ahead would fetch megabytes to use kilobytes.
        mapped.madvise(mmap.MADV_RANDOM)
        self._whole = np.frombuffer(mapped, dtype=np.uint8)
        # A map too, without an open file: the checksums of a large dataset are hundreds of megabytes.
        with pa.memory_map(str(sums)) as source:
            self._sums = memoryview(source.read_buffer()).cast("Q")
        self._batches: list[_RecordBatch | None] = [None] * len(info.batches)
        self._ends = list(accumulate(batch.rows for batch in info.batches))

    def locate(self, row: int) -> tuple[_RecordBatch, int]:
        """The record batch of a row, and the row's number in it."""
        index = bisect_right(self._ends, row)
        batch = self._batches[index]
        if batch is None:
            batch = self._batches[index] = _RecordBatch(self._whole, self._info.batches[index], self._seq_len)
        return batch, row - self._ends[index - 1] if index else row

    def read(self, row: int, room: memoryview) -> bytes:
        """Copy a row's tokens into `room` (its bytes) and return its segment lengths as uint16.

        What is checked is the copy that will be used.

        Raises:
            DataError: they do not match the row's checksum.
        """
        batch, local = self.locate(row)
        size = len(room)
        room[:] = batch.tokens[local * size : (local + 1) * size]
        start, stop = batch.bounds[local], batch.bounds[local + 1]
        seg_len = bytes(batch.seg_len[start:stop])
        # Python cuts a slice that reaches too far; an offset that made it reach there is damage too.
        if len(seg_len) != 2 * (stop - start) or row_sum(room, seg_len) != self._sums[row]:
            raise DataError(
                problem_text(
                    self._root,
                    f"Row {row} of shard {self._root / self._info.file} does not match its checksum: a bit of its "
                    f"tokens or segment lengths was flipped, or the file was overwritten",
                )
            )
        return seg_len


class _Split:
    """The shards of one source and split, opened when first used."""

    def __init__(self, root: Path, shards: tuple[ShardInfo, ...], seq_len: int, opened: _Opened) -> None:
        self._root, self._infos, self._seq_len, self._opened = root, shards, seq_len, opened
        self._shards: list[_Shard | None] = [None] * len(shards)
        self._ends = list(accumulate(shard.rows for shard in shards))
        self.rows = self._ends[-1] if self._ends else 0

    def locate(self, row: int) -> tuple[_Shard, int]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        index = bisect_right(self._ends, row)
        shard = self._shards[index]
        if shard is None:
            shard = self._shards[index] = _Shard(self._root, self._infos[index], self._seq_len)
            self._opened.add(self, index)
        return shard, row - self._ends[index - 1] if index else row

    def count_with(self, opened: _Opened) -> None:
        """Share the limit of open files with other datasets; before anything is read."""
        self._opened = opened

    def close(self, index: int) -> None:
        """Forget a shard; its map goes when nobody reads from it any more."""
        self._shards[index] = None


class _Opened:
    """Keeps the number of mapped shards below the process's limit of open files, since every map holds one.

    The oldest goes first: reads are random, so none is more likely than another to be asked for next.
    """

    def __init__(self, shards: int) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = shards + _OTHER_FILES
        if soft != resource.RLIM_INFINITY and soft < wanted:
            soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        self._most = max(1, wanted - _OTHER_FILES if soft == resource.RLIM_INFINITY else soft - _OTHER_FILES)
        self._order: deque[tuple[_Split, int]] = deque()

    def add(self, split: _Split, index: int) -> None:
        self._order.append((split, index))
        if len(self._order) > self._most:
            oldest, at = self._order.popleft()
            oldest.close(at)


class RowReader:
    """Reads rows of sources by number. Every row is checked as it is read; several threads may read."""

    seq_len: int
    _splits: dict[tuple[int, str], _Split]

    def rows(self, source: int, split: str) -> int:
        """Number of rows of a source (by index) in a split ("train" or "eval")."""
        return self._splits[source, split].rows

    def read(
        self,
        split: str,
        source_R: npt.NDArray[np.int64],
        row_R: npt.NDArray[np.int64],
        into: npt.NDArray[np.uint16] | None = None,
    ) -> RawRows:
        """Copy N rows out of the shards and check each: about 4 us a row of 8,192 tokens from a cached file.

        `into` is memory for the tokens, uint16 [R, T] and contiguous; without it they are given new memory.

        Raises:
            DataError: a row is damaged; the message names its shard.
        """
        tokens_RT = np.empty((len(row_R), self.seq_len), dtype=np.uint16) if into is None else into
        room, size, lengths = tokens_RT.data.cast("B"), self.seq_len * _TOKEN_BYTES, []
        for at, (source, row) in enumerate(zip(source_R.tolist(), row_R.tolist(), strict=True)):
            shard, local = self._splits[source, split].locate(row)
            lengths.append(shard.read(local, room[at * size : (at + 1) * size]))
        seg_count_R = np.array([len(seg_len) // 2 for seg_len in lengths], dtype=np.int64)
        seg_len_I = np.frombuffer(b"".join(lengths), dtype="<u2").astype(np.int64)
        return RawRows(tokens_RT, seg_count_R, seg_len_I)

    def segments(self, split: str, source: int, row: int) -> list[Segment]:
        """The document pieces of one row, in order.

        Raises:
            DataError: the row is damaged.
        """
        shard, local = self._splits[source, split].locate(row)
        shard.read(local, memoryview(bytearray(self.seq_len * _TOKEN_BYTES)))
        batch, local = shard.locate(local)
        start, stop = batch.bounds[local], batch.bounds[local + 1]
        columns = (batch.seg_len, batch.seg_doc, batch.seg_off)
        return [Segment(*values) for values in zip(*(column[start:stop].tolist() for column in columns), strict=True)]


class TokenDataset(RowReader):
    """An open dataset.

    Args:
        root: the folder that `rxt-dist data build` made.
        tokenizer_sha256: fingerprint of the tokenizer that the caller uses, if it has one.

    Raises:
        DataError: no dataset there, a file missing or of the wrong size, another tokenizer.
    """

    def __init__(self, root: Path, tokenizer_sha256: str | None = None) -> None:
        self.root = root
        self.manifest: DatasetManifest = load_manifest(root)
        self.seq_len = self.manifest.seq_len
        require_tokenizer(root, self.manifest.tokenizer_sha256, tokenizer_sha256)
        shards = list(self.manifest.shards())
        problem = _first_size_problem(root, shards)
        if problem:
            raise DataError(problem_text(root, problem))
        opened = _Opened(len(shards))
        self._splits = {
            (index, name): _Split(root, source.split(name).shards, self.seq_len, opened)
            for index, source in enumerate(self.manifest.sources)
            for name in SPLITS
        }

    @property
    def digest(self) -> str:
        """The root digest: where two are equal, their token streams are."""
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


class JoinedDataset(RowReader):
    """Datasets of one row length read as one: the sources of the second come after those of the first, and so on."""

    def __init__(self, datasets: Sequence[TokenDataset]) -> None:
        self.datasets = tuple(datasets)
        self.seq_len = self.datasets[0].seq_len
        opened = _Opened(sum(len(list(dataset.manifest.shards())) for dataset in self.datasets))
        self._splits = {}
        for dataset in self.datasets:
            first = len(self._splits) // len(SPLITS)
            for (source, name), split in dataset._splits.items():
                split.count_with(opened)
                self._splits[first + source, name] = split


def problem_text(root: Path, problem: str) -> str:
    """What is wrong with a file of the dataset, and what to do about it."""
    return f"{problem}. Run `rxt-dist data verify {root} --repair`, which finds all that is damaged and mends it."


def _first_size_problem(root: Path, shards: Sequence[ShardInfo]) -> str | None:
    """The first missing or wrongly sized file, by a look at all of them.

    A look costs microseconds on a local disk and most of a millisecond on a network one, so many are made at once.
    """
    folder = str(root)

    def first(part: Sequence[ShardInfo]) -> str | None:
        for shard in part:
            for file, size in ((shard.file, shard.bytes), (sums_file(shard.file), SUM_BYTES * shard.rows)):
                path = os.path.join(folder, file)
                if problem := size_problem(path, size):
                    return f"{path} {problem}"
        return None

    parts = [shards[start : start + _STAT_FILES] for start in range(0, len(shards), _STAT_FILES)]
    if len(parts) < 2:
        return first(shards)
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        return next(filter(None, pool.map(first, parts)), None)
