"""Reading shards front to back, a record batch at a time: bounded memory, no memory map, no Arrow.

Tokens and segment lengths are compared with the checksums of their rows as they are read. `seg_doc` and `seg_off` are
vouched for by the shard's hash alone, so who must not be wrong about documents hashes the shard first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.dialogues import DialogueShard
from rxt_dist.data.manifest import ShardInfo, sums_file
from rxt_dist.data.rows import PackedRows, row_sums
from rxt_dist.errors import DataError

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
AnyShard = ShardInfo | DialogueShard


def unit_name(shard: ShardInfo | DialogueShard) -> str:
    """The unit of work that wrote a shard: `en/train/u00000-000.arrow` is of `u00000`."""
    return Path(shard.file).stem.rsplit("-", 1)[0]


def read_rows(
    root: Path, shard: ShardInfo, batch: int, seq_len: int, start: int = 0, stop: int | None = None
) -> PackedRows:
    """Rows [start, stop) of a shard's record batch of that number, compared with their checksums.

    Raises:
        DataError: the file is missing, or a row is not what it was.
    """
    rows = read_unchecked(root, shard, batch, seq_len, start, stop)
    first = start + sum(before.rows for before in shard.batches[:batch])
    sums = root / sums_file(shard.file)
    try:
        wanted = np.fromfile(sums, dtype="<u8", count=rows.rows, offset=8 * first)
    except OSError as error:
        raise DataError(f"{sums} cannot be read ({error.strerror}). {_ADVICE}") from error
    if len(wanted) != rows.rows:
        raise DataError(f"{sums} ends too early. {_ADVICE}")
    differing = np.flatnonzero(row_sums(rows) != wanted)
    if len(differing):
        row = first + int(differing[0])
        raise DataError(f"Row {row} of shard {root / shard.file} does not match its checksum. {_ADVICE}")
    return rows


def read_unchecked(
    root: Path, shard: ShardInfo, batch_number: int, seq_len: int, start: int = 0, stop: int | None = None
) -> PackedRows:
    """As `read_rows`, without the checksums: for what makes them.

    Raises:
        DataError: the file is missing, or its segment bounds cannot be true.
    """
    path, batch = root / shard.file, shard.batches[batch_number]
    stop = batch.rows if stop is None else stop

    def values(dtype: str, offset: int, count: int) -> npt.NDArray[Any]:
        found = np.fromfile(path, dtype=dtype, count=count, offset=offset)
        if len(found) != count:
            raise DataError(f"Shard {path} ends too early. {_ADVICE}")
        return found

    try:
        bounds = values("<i8", batch.seg_len_offsets + 8 * start, stop - start + 1)
        first, count = int(bounds[0]), int(bounds[-1] - bounds[0])
        counts = np.diff(bounds)
        if first < 0 or counts.min(initial=0) < 0 or count > (stop - start) * seq_len:
            raise DataError(f"Shard {path} has impossible segment bounds: it is damaged. {_ADVICE}")
        tokens = values("<u2", batch.tokens + 2 * seq_len * start, (stop - start) * seq_len)
        return PackedRows(
            tokens.reshape(stop - start, seq_len),
            counts,
            values("<u2", batch.seg_len + 2 * first, count),
            values("<u4", batch.seg_doc + 4 * first, count),
            values("<u4", batch.seg_off + 4 * first, count),
        )
    except OSError as error:
        raise DataError(f"Shard {path} cannot be read ({error.strerror}). {_ADVICE}") from error


_ADVICE = "`rxt-dist data verify` finds out what is damaged, and mends it with --repair."


def scan(root: Path, shards: tuple[ShardInfo, ...], seq_len: int) -> Iterator[PackedRows]:
    """All rows of these shards in order, up to 4,096 at a time."""
    for shard in shards:
        for batch in range(len(shard.batches)):
            yield read_rows(root, shard, batch, seq_len)


def starts_of(rows: PackedRows) -> Int64Array:
    """Where each segment begins in the flattened tokens, int64 [I]."""
    seq_len = rows.tokens_RT.shape[1]
    lengths = rows.seg_len_I.astype(np.int64)
    row_of = np.repeat(np.arange(rows.rows), rows.seg_count_R)
    before = np.cumsum(lengths) - lengths
    used_R = np.bincount(row_of, weights=lengths, minlength=rows.rows).astype(np.int64)
    return np.asarray(before + (np.cumsum(seq_len - used_R) - (seq_len - used_R))[row_of])


def locate(shards: Sequence[AnyShard], row: int) -> tuple[AnyShard, int]:
    """Of all shards of a source and split the one that holds a row (or dialogue), and the row's number in it."""
    for shard in shards:
        rows = shard.dialogues if isinstance(shard, DialogueShard) else shard.rows
        if row < rows:
            return shard, row
        row -= rows
    raise IndexError(row)


def pieces_of(root: Path, shards: tuple[ShardInfo, ...], seq_len: int) -> tuple[Int32Array, ...]:
    """Row, start within the row, length, document and offset of every piece, int32 [I] each."""
    columns: list[list[npt.NDArray[Any]]] = [[np.empty(0, dtype=np.int32)] for _ in range(5)]
    first = 0
    for shard in shards:
        for batch in range(len(shard.batches)):
            rows = read_rows(root, shard, batch, seq_len)
            row_of = np.repeat(np.arange(rows.rows), rows.seg_count_R)
            parts: list[npt.NDArray[Any]] = [
                row_of + first,
                starts_of(rows) - row_of * seq_len,
                rows.seg_len_I,
                rows.seg_doc_I,
                rows.seg_off_I,
            ]
            for column, part in zip(columns, parts, strict=True):
                column.append(part.astype(np.int32))
            first += rows.rows
    return tuple(np.concatenate(column) for column in columns)


def gather(
    root: Path,
    shards: tuple[ShardInfo, ...],
    seq_len: int,
    row_I: Int32Array,
    start_I: Int32Array,
    length_I: Int32Array,
) -> npt.NDArray[np.uint16]:
    """The tokens of these pieces, one after another; only the rows that hold them are read."""
    wanted = np.unique(row_I)
    parts, first = [], 0
    for shard in shards:
        for number, batch in enumerate(shard.batches):
            here = wanted[(wanted >= first) & (wanted < first + batch.rows)] - first
            breaks = np.flatnonzero(np.diff(here) > 1) + 1
            for run in np.split(here, breaks) if len(here) else []:
                rows = read_rows(root, shard, number, seq_len, int(run[0]), int(run[-1]) + 1)
                parts.append(rows.tokens_RT.reshape(-1))
            first += batch.rows
    flat = np.concatenate(parts)
    source = np.searchsorted(wanted, row_I) * seq_len + start_I
    before = np.cumsum(length_I) - length_I
    return np.asarray(flat[np.repeat(source - before, length_I) + np.arange(int(length_I.sum()))])
