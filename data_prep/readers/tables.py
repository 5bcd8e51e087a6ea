"""Tables: .parquet (cut at row groups) and .arrow (IPC files are cut at record batches, streams are not)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_prep.readers.base import (
    Extent,
    Fields,
    Input,
    Record,
    Slice,
    language_columns,
    not_a_language,
    settle_columns,
)
from data_prep.readers.pages import dictionary, pages
from rxt_dist.errors import DataError, nearest

_BATCH_ROWS, _BATCH_BYTES = 1000, 8 << 20
# Of a large column chunk fewer rows are decoded at once: its few longest texts may stand beside each other.
_LARGE_CHUNK_BYTES, _LARGE_CHUNK_ROWS = 64 << 20, 64
_DECODED_BYTES = 64 << 20  # what the rows that are decoded at once take at most, where a single one does not take more
# A dictionary above this, which most writers never make, is not written out for each row that uses it.
_LARGE_DICTIONARY_BYTES, _INDEX_ROWS = 2 << 20, 1 << 16
_EXPANDING = 2  # a table that unpacks to more than this many times what it stores is planned by what it unpacks to
_BUFFER_BYTES = 1 << 20
_ARROW_FILE_MAGIC = b"ARROW1"


def parquet_extent(item: Input) -> Extent:
    """One part a row group; its size is that of the text column before compression, or what it decodes to where that
    is more than twice as much.

    Raises:
        DataError: no parquet file, or a missing or unsuitable column.
    """
    with _readable(item.path), _parquet(item.path) as table:
        item = settle_columns(item, table.schema_arrow.names)
        require_text(item, table.schema_arrow)
        with open(item.path, "rb") as file:
            parts = tuple(_text_bytes(table, file, item, group) for group in range(table.num_row_groups))
    return Extent(item, sum(parts), parts=parts)


def read_parquet(part: Slice) -> Iterator[Record]:
    """The rows of the slice's row groups.

    Memory: up to 64 MB of decoded texts, or one of them and about three times the largest page, whatever the size of
    the row group and however often its rows refer to one text.

    Raises:
        DataError: a row group cannot be read.
    """
    item = part.input
    with _readable(item.path), _parquet(item.path) as table, open(item.path, "rb") as file:
        columns = _columns(item, table.schema_arrow.names)
        count = table.num_row_groups
        if part.stop > count:
            raise DataError(f"{item.path} has {count} row groups; {part.stop} are planned. It was overwritten.")
        row = sum(table.metadata.row_group(group).num_rows for group in range(part.start))
        for group in range(part.start, part.stop):
            with _readable(f"{item.path}, row group {group},"):
                for batch in _group_batches(table, file, item.path, group, columns):
                    yield from batch_records(item, batch, row)
                    row += batch.num_rows


def _group_batches(
    table: pq.ParquetFile, file: BinaryIO, path: str, group: int, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, so many at a time that they fit into memory."""
    schema = table.schema_arrow
    texts = [name for name in columns if _is_text(schema.field(name).type)]  # lists and structs are more than a column
    indexed = [name for name in texts if _refers_to_large_texts(table, file, name, group)]
    most = rows_at_once(table, file, group, [name for name in columns if name not in indexed])
    if indexed:
        yield from _index_batches(path, group, columns, indexed, most)
    else:
        yield from table.iter_batches(most, row_groups=[group], columns=columns, use_threads=False)


def _index_batches(
    path: str, group: int, columns: list[str], indexed: list[str], most: int
) -> Iterator[pa.RecordBatch]:
    """The rows of a row group, with some columns as a dictionary and numbers of its entries, as they are stored."""
    with _parquet(path, read_dictionary=indexed) as table:
        yield from table.iter_batches(most, row_groups=[group], columns=columns, use_threads=False)


def rows_at_once(table: pq.ParquetFile, file: BinaryIO, group: int, columns: Sequence[str]) -> int:
    """How many rows of a row group to decode together: some 8 MB of them, but no more than surely take 64 MB.

    Args:
        file: the same file, for the headers of its pages.
        columns: those that are read, by their names at the top; nested ones count with all that is in them.
    """
    metadata = table.metadata.row_group(group)
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    inside = tuple(f"{name}." for name in columns)
    chunks = [chunk for chunk in chunks if f"{chunk.path_in_schema}.".startswith(inside)]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    longest = sum(max((page.bytes for page in pages(file, chunk)), default=0) for chunk in chunks)
    most = _LARGE_CHUNK_ROWS if size > _LARGE_CHUNK_BYTES else _BATCH_ROWS if chunks else _INDEX_ROWS
    return max(1, min(most, _BATCH_BYTES * metadata.num_rows // max(size, 1), _DECODED_BYTES // max(longest, 1)))


def _refers_to_large_texts(table: pq.ParquetFile, file: BinaryIO, column: str, group: int) -> bool:
    """Whether all texts of a row group stand in a large dictionary."""
    chunk = _chunk(table, column, group)
    stored = dictionary(file, chunk)
    if stored is None or stored.bytes <= _LARGE_DICTIONARY_BYTES:
        return False
    return all(page.by_index or page.is_dictionary for page in pages(file, chunk))


def _text_bytes(table: pq.ParquetFile, file: BinaryIO, item: Input, group: int) -> int:
    """The text in a row group: what it takes before compression, unless few entries of a dictionary stand for much."""
    column = str(item.text_column)
    chunk = _chunk(table, column, group)
    size = int(chunk.total_uncompressed_size)
    stored = dictionary(file, chunk)
    if stored is None or chunk.num_values * stored.bytes <= _EXPANDING * size * max(stored.values, 1):
        return size
    found = pages(file, chunk)
    if all(page.by_index or page.is_dictionary for page in found):
        batches = _index_batches(item.path, group, [column], [column], _INDEX_ROWS)
        decoded = sum(int(_carried_lengths(item, batch.column(0)).sum()) for batch in batches)
    else:
        average = stored.bytes / max(stored.values, 1)
        decoded = int(sum(page.values * average if page.by_index else page.bytes for page in found))
    return decoded if decoded > _EXPANDING * size else size


def _chunk(table: pq.ParquetFile, column: str, group: int) -> Any:
    paths = [table.schema.column(index).path for index in range(len(table.schema))]
    return table.metadata.row_group(group).column(paths.index(column))


def arrow_extent(item: Input) -> Extent:
    """One part a record batch of an IPC file; a stream, which has to be read from its beginning, is one part.

    The text in them is taken from the first record batch; where a dictionary stands for more than twice as much, from
    all of them.

    Raises:
        DataError: no Arrow file, or a missing or unsuitable column.
    """
    with _readable(item.path), _arrow(item.path) as reader:
        item = settle_columns(item, reader.schema.names)
        require_text(item, reader.schema)
        if isinstance(reader, pa.RecordBatchFileReader):
            count = reader.num_record_batches
            parts = (reader.get_batch(0).column(item.text_column).nbytes,) * count if count else ()
        else:
            first = next(iter(reader), None)
            share = first.column(item.text_column).nbytes / max(first.nbytes, 1) if first is not None else 0.0
            parts = (int(item.bytes * share),)
        if pa.types.is_dictionary(reader.schema.field(item.text_column).type):
            decoded = _decoded_bytes(item)
            parts = decoded if sum(decoded) > _EXPANDING * sum(parts) else parts
    return Extent(item, sum(parts), parts=parts)


def _decoded_bytes(item: Input) -> tuple[int, ...]:
    """The text in each record batch of an IPC file, or in all of a stream, whose texts stand in a dictionary."""
    with _arrow(item.path, partial(_columns, item)) as reader:
        is_file = isinstance(reader, pa.RecordBatchFileReader)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        sizes = [int(_carried_lengths(item, batch.column(str(item.text_column))).sum()) for batch in batches]
    return tuple(sizes) if is_file else (sum(sizes),)


def read_arrow(part: Slice) -> Iterator[Record]:
    """The rows of the slice's record batches. Memory: one of them, and about 8 MB of its texts as Python's.

    Raises:
        DataError: a record batch cannot be read.
    """
    item = part.input
    with _readable(item.path), _arrow(item.path, partial(_columns, item)) as reader:
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
    lengths = _carried_lengths(item, batch.column(str(item.text_column)))
    for name in language_columns(item, batch.schema.names):
        lengths += _byte_lengths(batch.column(name))
    for start, stop in _at_once(lengths):
        yield from _records(item, batch.slice(start, stop - start), row + start, prefix)


def _at_once(lengths: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of rows, each of about 8 MB and 1,000 rows at most; `lengths` are the bytes of each row."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(ends):
        before = int(ends[start - 1]) if start else 0
        within = int(np.searchsorted(ends, before + _BATCH_BYTES, side="right"))
        stop = max(start + 1, min(within, start + _BATCH_ROWS))
        yield start, stop
        start = stop


def _records(item: Input, batch: pa.RecordBatch, row: int, prefix: str) -> Iterator[Record]:
    """Texts are taken as bytes, so that invalid UTF-8 is mended like that of every other format."""
    texts = batch.column(str(item.text_column))
    too_large = pa.array(_byte_lengths(texts) > item.max_document_bytes)
    values, valid = _strings(_without(texts, too_large) if pc.any(too_large).as_py() else texts)
    tags = [_strings(batch.column(name))[0] for name in language_columns(item, batch.schema.names)]
    for index, (text, large) in enumerate(zip(values, too_large.to_pylist(), strict=True)):
        language = next((of_column[index] for of_column in tags if of_column[index]), None)
        yield Record(f"{prefix}{row + index}", text, language, valid, large)


def _without(texts: pa.Array, left_out: pa.Array) -> pa.Array:
    """The texts with null for those that are left out; of a dictionary without unpacking it."""
    if pa.types.is_dictionary(texts.type):
        indices = pc.if_else(left_out, pa.scalar(None, texts.indices.type), texts.indices)
        return pa.DictionaryArray.from_arrays(indices, texts.dictionary)
    texts = _as_binary(texts)
    return pc.if_else(left_out, pa.scalar(None, texts.type), texts)


def _carried_lengths(item: Input, texts: pa.Array) -> npt.NDArray[np.int64]:
    """Bytes of each text, 0 of those that are not carried along."""
    lengths = _byte_lengths(texts)
    return np.where(lengths > item.max_document_bytes, 0, lengths)


def _byte_lengths(texts: pa.Array) -> npt.NDArray[np.int64]:
    """Bytes of each text, 0 of null, without unpacking a dictionary."""
    if pa.types.is_dictionary(texts.type):
        lengths = pc.take(pc.binary_length(_as_binary(texts.dictionary)), texts.indices)
    else:
        lengths = pc.binary_length(_as_binary(texts))
    found: npt.NDArray[np.int64] = pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return found


def _strings(texts: pa.Array) -> tuple[list[str | None], bool]:
    """The texts, and whether all of them are valid UTF-8, which Arrow tells of a whole batch in no time.

    Rows that refer to one entry of a dictionary share one text.
    """
    if pa.types.is_dictionary(texts.type):
        used, place = np.unique(texts.indices.drop_null().to_numpy(), return_inverse=True)
        entries, valid = _strings(texts.dictionary.take(pa.array(used)))
        shared = iter(place.tolist())
        return [entries[next(shared)] if there else None for there in texts.indices.is_valid().to_pylist()], valid
    texts = _as_binary(texts)
    try:
        return texts.cast(pa.large_string()).to_pylist(), True
    except pa.ArrowInvalid:
        found = texts.to_pylist()
        return [None if text is None else text.decode("utf-8", errors="surrogateescape") for text in found], False


def _as_binary(texts: pa.Array) -> pa.Array:
    kind = texts.type
    return texts.cast(pa.binary() if kind in (pa.string(), pa.binary()) else pa.large_binary())


# ---------------------------------------------------------------------------------------------------------------------
# Whole records, of any columns
# ---------------------------------------------------------------------------------------------------------------------


def read_parquet_objects(item: Input, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, row) of all rows, with those of the columns `fields` that there are.

    What is null is left out, in structs too: a column has the fields of all its rows. A byte of a text that is no UTF-8
    is a lone surrogate. Memory: as `read_parquet`.

    Raises:
        DataError: none of the columns is there, or one twice; a row group cannot be read.
    """
    with _readable(item.path), _parquet(item.path) as table, open(item.path, "rb") as file:
        columns, row = _known(item, table.schema_arrow.names, fields), 1
        for group in range(table.num_row_groups):
            with _readable(f"{item.path}, row group {group},"):
                for batch in _group_batches(table, file, item.path, group, columns):
                    yield from _objects(item, batch, row)
                    row += batch.num_rows


def read_arrow_objects(item: Input, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_parquet_objects`. Memory: a record batch, and about 8 MB of it as Python's."""
    with _readable(item.path), _arrow(item.path, lambda names: _known(item, names, fields)) as reader:
        is_file = isinstance(reader, pa.RecordBatchFileReader)
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches)) if is_file else reader
        row = 1
        for batch in batches:
            yield from _objects(item, batch, row)
            row += batch.num_rows


def _known(item: Input, names: list[str], fields: Fields) -> list[str]:
    lacking = next((name for name in fields.asked if name not in names), None)
    if lacking is not None:
        raise DataError(
            f"{item.path} has no column '{lacking}', which was asked for; it has {names}.{nearest(lacking, names)}"
        )
    columns = [name for name in names if name in fields.all]
    if not set(columns) & set(fields.needed):
        raise DataError(
            f"{item.path} has none of the columns {', '.join(fields.needed)}: it has the columns {names}. "
            f"{fields.advice}"
        )
    twice = next((name for name in columns if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{item.path} has more than one column '{twice}'; rename or remove all but one of them.")
    return columns


def _objects(item: Input, batch: pa.RecordBatch, row: int) -> Iterator[tuple[str, dict[str, Any]]]:
    names = batch.schema.names
    for start, stop in _ranges(batch):
        part = batch.slice(start, stop - start)
        values = [_strings(of)[0] if _is_text(of.type) else _nested(of) for of in part.columns]
        for index, found in enumerate(zip(*values, strict=True)):
            place = f"{item.path}, row {row + start + index}"
            yield place, {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _ranges(batch: pa.RecordBatch) -> Iterator[tuple[int, int]]:
    """As `_at_once`, of all columns; small batches, of which there may be thousands, are not measured."""
    unfolds = any(pa.types.is_dictionary(column.type) for column in batch.columns)
    if not unfolds and batch.num_rows <= _BATCH_ROWS and batch.nbytes <= _BATCH_BYTES:
        return iter([(0, batch.num_rows)])
    lengths = np.zeros(batch.num_rows, dtype=np.int64)
    for column in batch.columns:
        is_text = _is_text(column.type)
        lengths += _byte_lengths(column) if is_text else column.nbytes // max(batch.num_rows, 1)
    return _at_once(lengths)


def _nested(column: pa.Array) -> list[Any]:
    """The values of a column of numbers, lists or structs."""
    try:
        return [_plain(value) for value in column.to_pylist()]
    except UnicodeDecodeError:
        return [_plain(value) for value in column.cast(_with_bytes(column.type)).to_pylist()]


def _plain(value: Any) -> Any:
    """The value without the fields of structs that are null, in any depth, and with bytes as text."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items() if item is not None}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """The type with bytes in the place of text, in any depth."""
    if pa.types.is_struct(kind):
        return pa.struct([kind.field(index).with_type(_with_bytes(kind.field(index).type))
                          for index in range(kind.num_fields)])  # fmt: skip
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_with_bytes(kind.value_type)))
    return pa.large_binary() if _is_text(kind) and not pa.types.is_null(kind) else kind


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
def _parquet(path: str, read_dictionary: list[str] | None = None) -> Iterator[pq.ParquetFile]:
    # Buffered streams instead of pre-buffering: a page is in memory at a time, and not a whole row group.
    # Checksums of pages are looked at where the writer made any.
    with pq.ParquetFile(
        path,
        buffer_size=_BUFFER_BYTES,
        pre_buffer=False,
        page_checksum_verification=True,
        read_dictionary=read_dictionary,
    ) as table:
        yield table


@contextmanager
def _arrow(path: str, choose: Callable[[list[str]], list[str]] | None = None) -> Iterator[Any]:
    """A reader of an IPC file or stream (Hugging Face writes the latter under the same suffix), with the columns that
    are chosen from all."""
    with open(path, "rb") as probe:
        is_file = probe.read(len(_ARROW_FILE_MAGIC)) == _ARROW_FILE_MAGIC
    start = pa.ipc.open_file if is_file else pa.ipc.open_stream
    options = pa.ipc.IpcReadOptions(use_threads=False)
    with pa.OSFile(path) as file:
        if choose is not None:
            names = start(file).schema.names
            options.included_fields = sorted(names.index(name) for name in choose(names))
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{what} cannot be read as a table ({error}). Fetch or make the file again.") from error
