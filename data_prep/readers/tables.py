"""Tables: .parquet (cut at row groups) and .arrow (IPC files are cut at record batches, streams are not)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.readers.base import Extent, Input, Record, Slice, language_columns, not_a_language, settle_columns
from rxt_dist.errors import DataError

_BATCH_ROWS, _BATCH_BYTES = 1000, 8 << 20
# Of a large column chunk fewer rows are decoded at once: its few longest texts may stand beside each other.
_LARGE_CHUNK_BYTES, _LARGE_CHUNK_ROWS = 64 << 20, 64
_BUFFER_BYTES = 1 << 20
_ARROW_FILE_MAGIC = b"ARROW1"


def parquet_extent(item: Input) -> Extent:
    """One part a row group; its size is that of the text column before compression.

    Raises:
        DataError: no parquet file, or a missing or unsuitable column.
    """
    with _readable(item.path), _parquet(item.path) as table:
        item = settle_columns(item, table.schema_arrow.names)
        require_text(item, table.schema_arrow)
        parts = tuple(size for size, _ in _groups(table, item))
    return Extent(item, sum(parts), parts=parts)


def read_parquet(part: Slice) -> Iterator[Record]:
    """The rows of the slice's row groups. Memory: about 8 MB of text, or one page, whatever the row group's size.

    Raises:
        DataError: a row group cannot be read.
    """
    item = part.input
    with _readable(item.path), _parquet(item.path) as table:
        columns = _columns(item, table.schema_arrow.names)
        groups = _groups(table, item)
        if part.stop > len(groups):
            raise DataError(f"{item.path} has {len(groups)} row groups; {part.stop} are planned. It was overwritten.")
        row = sum(rows for _, rows in groups[: part.start])
        for group in range(part.start, part.stop):
            size, rows = groups[group]
            most = _BATCH_ROWS if size <= _LARGE_CHUNK_BYTES else _LARGE_CHUNK_ROWS
            batch_rows = max(1, min(most, _BATCH_BYTES * rows // max(size, 1)))
            with _readable(f"{item.path}, row group {group},"):
                for batch in table.iter_batches(batch_rows, row_groups=[group], columns=columns, use_threads=False):
                    yield from batch_records(item, batch, row)
                    row += batch.num_rows


def arrow_extent(item: Input) -> Extent:
    """One part a record batch of an IPC file; a stream, which has to be read from its beginning, is one part.

    The text in them is taken from the first record batch.

    Raises:
        DataError: no Arrow file, or a missing or unsuitable column.
    """
    with _readable(item.path), _arrow(item.path, None) as reader:
        item = settle_columns(item, reader.schema.names)
        require_text(item, reader.schema)
        if isinstance(reader, pa.RecordBatchFileReader):
            count = reader.num_record_batches
            parts = (reader.get_batch(0).column(item.text_column).nbytes,) * count if count else ()
        else:
            first = next(iter(reader), None)
            share = first.column(item.text_column).nbytes / max(first.nbytes, 1) if first is not None else 0.0
            parts = (int(item.bytes * share),)
    return Extent(item, sum(parts), parts=parts)


def read_arrow(part: Slice) -> Iterator[Record]:
    """The rows of the slice's record batches. Memory: one of them, and about 8 MB of its texts as Python's.

    Raises:
        DataError: a record batch cannot be read.
    """
    item = part.input
    with _readable(item.path), _arrow(item.path, item) as reader:
        if isinstance(reader, pa.RecordBatchFileReader):
            for index in range(part.start, part.stop):
                with _readable(f"{item.path}, record batch {index},"):
                    yield from batch_records(item, reader.get_batch(index), 0, f"{index}:")
            return
        row = 0
        for batch in reader:
            yield from batch_records(item, batch, row)
            row += batch.num_rows


def batch_records(item: Input, batch: pa.RecordBatch, row: int, prefix: str = "") -> Iterator[Record]:
    """The records of a batch whose first row is number `row`; about 8 MB of text at a time become Python's."""
    lengths = _byte_lengths(batch.column(str(item.text_column)))
    lengths[lengths > item.max_document_bytes] = 0  # these are not carried along
    ends = np.cumsum(lengths)
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        within = int(np.searchsorted(ends, before + _BATCH_BYTES, side="right"))
        stop = max(start + 1, min(within, start + _BATCH_ROWS))
        yield from _records(item, batch.slice(start, stop - start), row + start, prefix)
        start = stop


def _records(item: Input, batch: pa.RecordBatch, row: int, prefix: str) -> Iterator[Record]:
    """Texts are taken as bytes, so that invalid UTF-8 is mended like that of every other format."""
    texts = _as_binary(batch.column(str(item.text_column)))
    too_large = pc.fill_null(pc.greater(pc.binary_length(texts), item.max_document_bytes), False)
    if pc.any(too_large).as_py():
        texts = pc.if_else(too_large, pa.scalar(None, texts.type), texts)
    values, valid = _strings(texts)
    tags = [_strings(_as_binary(batch.column(name)))[0] for name in language_columns(item, batch.schema.names)]
    for index, (text, large) in enumerate(zip(values, too_large.to_pylist(), strict=True)):
        language = next((of_column[index] for of_column in tags if of_column[index]), None)
        yield Record(f"{prefix}{row + index}", text, language, valid, large)


def _byte_lengths(texts: pa.Array) -> npt.NDArray[np.int64]:
    """Bytes of each text, 0 of null, without unpacking a dictionary."""
    if pa.types.is_dictionary(texts.type):
        lengths = pc.take(pc.binary_length(_as_binary(texts.dictionary)), texts.indices)
    else:
        lengths = pc.binary_length(_as_binary(texts))
    found: npt.NDArray[np.int64] = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _strings(texts: pa.Array) -> tuple[list[str | None], bool]:
    """The texts, and whether all of them are valid UTF-8, which Arrow tells of a whole batch in no time."""
    try:
        return texts.cast(pa.large_string()).to_pylist(), True
    except pa.ArrowInvalid:
        found = texts.to_pylist()
        return [None if text is None else text.decode("utf-8", errors="surrogateescape") for text in found], False


def _as_binary(texts: pa.Array) -> pa.Array:
    kind = texts.type
    if pa.types.is_dictionary(kind):
        return _as_binary(texts.dictionary_decode())
    return texts.cast(pa.binary() if kind in (pa.string(), pa.binary()) else pa.large_binary())


def require_text(item: Input, schema: pa.Schema) -> None:
    """Raise DataError if the column of the text, or one of the language, holds something else than text."""
    kind = schema.field(item.text_column).type
    if not _is_text(kind):
        raise DataError(
            f"{item.path}: the text column '{item.text_column}' has type {kind}, not string. Name another text_column."
        )
    for name in language_columns(item, schema.names):
        if not _is_text(schema.field(name).type):
            raise not_a_language(f"{item.path}, column '{name}',", schema.field(name).type)


def _is_text(kind: pa.DataType) -> bool:
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (
        "is_string",
        "is_large_string",
        "is_string_view",
        "is_binary",
        "is_large_binary",
        "is_binary_view",
        "is_null",
    )
    return any(getattr(pa.types, test)(plain) for test in tests)


@contextmanager
def _parquet(path: str) -> Iterator[pq.ParquetFile]:
    # Buffered streams instead of pre-buffering: a page is in memory at a time, and not a whole row group.
    # Checksums of pages are looked at where the writer made any.
    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True) as table:
        yield table


def _groups(table: pq.ParquetFile, item: Input) -> list[tuple[int, int]]:
    """(uncompressed bytes of the text column, rows) of each row group."""
    paths = [table.schema.column(index).path for index in range(len(table.schema))]
    column = paths.index(item.text_column)
    groups = [table.metadata.row_group(index) for index in range(table.num_row_groups)]
    return [(group.column(column).total_uncompressed_size, group.num_rows) for group in groups]


@contextmanager
def _arrow(path: str, item: Input | None) -> Iterator[Any]:
    """A reader of an IPC file or stream (Hugging Face writes the latter under the same suffix), with only the columns
    of `item` where it is given."""
    with open(path, "rb") as probe:
        is_file = probe.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    start = pa.ipc.open_file if is_file else pa.ipc.open_stream
    options = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.OSFile(path) as file:
        if item is not None:
            names = start(file).schema.names
            options.included_fields = sorted(names.index(name) for name in _columns(item, names))
            file.seek(0)
        with start(file, options=options) as reader:
            yield reader


def _columns(item: Input, names: list[str]) -> list[str]:
    """The columns to read, all of which are there."""
    item = settle_columns(item, names)
    return [str(item.text_column), *language_columns(item, names)]


@contextmanager
def _readable(what: str) -> Iterator[None]:
    try:
        yield
    except MemoryError:  # Arrow's own is an ArrowException too, and says nothing of the file
        raise
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{what} cannot be read as a table ({error}). Fetch or make the file again.") from error
