"""Plain text: .txt (a file is a document) and .jsonl, .jsonl.gz, .jsonl.zst (a line is a document or a record)."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from data_prep.readers.base import (
    Extent,
    Fields,
    Input,
    Record,
    Slice,
    is_blank,
    language_columns,
    not_a_language,
    parse_json,
    settle_columns,
)
from rxt_dist.errors import DataError

_LINE_PER_TEXT = 3  # room for JSON's escapes and the other fields in the line of the largest document
_SAMPLE_BYTES, _SAMPLE_PACKED_BYTES, _SAMPLE_UNPACKED_BYTES = 1 << 18, 1 << 20, 1 << 26
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BUFFER_BYTES, _SKIP_BYTES = 1 << 18, 1 << 20


def txt_extent(item: Input) -> Extent:
    """A .txt is one document, and so one part."""
    return Extent(item, item.bytes, parts=(item.bytes,))


def read_txt(part: Slice) -> Iterator[Record]:
    """The one document, or without opening the file that it is too large.

    Raises:
        DataError: the file cannot be read.
    """
    path = Path(part.input.path)
    with _undamaged(part.input.path):
        content = path.read_bytes() if path.stat().st_size <= part.input.max_document_bytes else None
    if content is None:
        yield Record("0", None, too_large=True)
    else:
        yield Record("0", _decoded(content))


def _decoded(content: bytes) -> str:
    """UTF-8, or UTF-16 where it begins with its byte order mark; what cannot be decoded is a lone surrogate."""
    if not content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-8-sig", errors="surrogateescape")
    odd = len(content) % 2
    return content[: len(content) - odd].decode("utf-16", errors="surrogatepass") + "\udc80" * odd


def jsonl_extent(item: Input) -> Extent:
    """Plain lines can be cut at any byte; a packed file has to be read from its beginning.

    How much of the bytes is text is taken from the first lines, how far a packed file unpacks from its first part.

    Raises:
        DataError: the first record has no text column, or the file is damaged.
    """
    packed = _codec(item.path) is not None
    if packed and not item.bytes:
        raise DataError(f"{item.path} is empty, which no packed file is. Fetch or make the file again.")
    whole = Slice(item, 0, item.bytes, item.bytes)
    text = passed = records = 0
    for number, _, line in _lines(whole, _line_bound(item)):
        passed += len(line or b"")
        if line is not None and not is_blank(line):
            record, _ = _parse(whole, number, line)
            item = item if records else settle_columns(item, list(record))
            records += 1
            text += len(str(record.get(str(item.text_column)) or "").encode(errors="surrogatepass"))
        if records and passed >= _SAMPLE_BYTES:
            break
    stored = item.bytes * (_unpacked(item.path) if packed else 1)
    text_bytes = int(stored * text / passed) if text else int(stored)
    return Extent(item, text_bytes, parts=(text_bytes,)) if packed else Extent(item, text_bytes, end=item.bytes)


def read_jsonl(part: Slice) -> Iterator[Record]:
    """The records of the lines that begin in the slice.

    Raises:
        DataError: a line is no JSON object, its text or language no text; a packed file is damaged.
    """
    item = part.input
    for number, offset, line in _lines(part, _line_bound(item)):
        if line is None:
            yield Record(str(offset), None, too_large=True)
            continue
        if is_blank(line):
            continue
        record, valid = _parse(part, number, line)
        assert item.text_column is not None, "a plan settles the column before a slice is read"
        text = record.get(item.text_column)
        if text is not None and not isinstance(text, str):
            where = _where(part, number)
            raise DataError(f"{where}: '{item.text_column}' is a {type(text).__name__}, not text. Mend the line.")
        language = next((record[name] for name in language_columns(item, list(record)) if record[name]), None)
        if language is not None and not isinstance(language, str):
            raise not_a_language(_where(part, number), f"a {type(language).__name__}")
        yield Record(str(offset), text, language, valid)


def read_jsonl_objects(item: Input, fields: Fields) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place for messages, object) of each line, with all of its fields; a byte that is no UTF-8 is a lone surrogate.

    Raises:
        DataError: a line is no JSON object, or longer than the largest record; a packed file is damaged.
    """
    bound, whole = item.max_document_bytes, Slice(item, 0, item.bytes, item.bytes)
    for number, _, line in _lines(whole, bound):
        place = _where(whole, number)
        if line is None:
            raise DataError(
                f"{place} is longer than {bound >> 20} MiB, which no record is. A .jsonl file holds one JSON object a "
                f"line; mend or remove the line."
            )
        if not is_blank(line):
            yield place, _parse(whole, number, line)[0]


def _line_bound(item: Input) -> int:
    """More bytes than the line of the largest document can have."""
    return item.max_document_bytes * _LINE_PER_TEXT


def _lines(part: Slice, bound: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(number within the slice from 1, byte offset, line) of each line that begins in the slice.

    A line of more bytes than the bound is passed over without being held, and given as None.
    """
    packed = _codec(part.input.path) is not None
    with _undamaged(part.input.path), _opened(part.input.path) as stream:
        number = offset = 0
        if part.start and not packed:
            # The line under way at the byte before belongs to the slice before; mostly that is its line feed alone.
            offset = stream.seek(part.start - 1) + _skip_line(stream)
        while packed or offset < part.stop:
            line = stream.readline(bound + 1)
            if not line:
                return
            number, begin, offset = number + 1, offset, offset + len(line)
            if len(line) > bound and not line.endswith(b"\n"):
                offset += _skip_line(stream)
                yield number, begin, None
            else:
                yield number, begin, line


@contextmanager
def _undamaged(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if "requires too much memory" in str(error):  # of zstd, for windows above 128 MiB
            raise DataError(f"{path} needs too large a window to be unpacked; recompress it without --long.") from error
        raise DataError(f"{path} is damaged, cut off or not readable: {error}. Fetch or make it again.") from error


def _skip_line(stream: BinaryIO) -> int:
    """Pass over the rest of a line; how many bytes it was."""
    passed = 0
    while piece := stream.readline(_SKIP_BYTES):
        passed += len(piece)
        if piece.endswith(b"\n"):
            break
    return passed


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    codec = _codec(path)
    if codec is None:
        with open(path, "rb", buffering=_BUFFER_BYTES) as plain:
            yield plain
        return
    # Arrow's streams go on over concatenated frames and members, and refuse a stream that ends before its end.
    with pa.OSFile(path) as packed, pa.CompressedInputStream(packed, codec) as stream:
        yield io.BufferedReader(stream, _BUFFER_BYTES)


def _unpacked(path: str) -> float:
    """Bytes that a byte of a packed file becomes, from its first MiB or the first 64 MiB that come out of it."""
    unpacked = 0
    with _undamaged(path), pa.OSFile(path) as packed, pa.CompressedInputStream(packed, str(_codec(path))) as stream:
        while packed.tell() < _SAMPLE_PACKED_BYTES and unpacked < _SAMPLE_UNPACKED_BYTES:
            piece = stream.read(_SKIP_BYTES)
            if not piece:
                break
            unpacked += len(piece)
        return unpacked / max(packed.tell(), 1)


def _codec(path: str) -> str | None:
    return _CODECS.get(Path(path).suffix.lower())


def _parse(part: Slice, number: int, line: bytes) -> tuple[dict[str, Any], bool]:
    """The object in a line, and whether no text in it can hold a surrogate."""
    try:
        decoded, valid = line.decode("utf-8-sig"), b"\\ud" not in line and b"\\uD" not in line
    except UnicodeDecodeError:
        decoded, valid = line.decode("utf-8-sig", errors="surrogateescape"), False
    try:
        record = parse_json(decoded)
    except ValueError as error:
        raise DataError(
            f"{_where(part, number)} is not JSON ({error}): {line[:80]!r}. A .jsonl file holds one JSON object a line; "
            f"mend or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{_where(part, number)} is a JSON {type(record).__name__}; each line must be an object.")
    return record, valid


def _where(part: Slice, number: int) -> str:
    """`FILE, line N`, counted from the beginning of the file."""
    if part.start and _codec(part.input.path) is None:
        before = Slice(part.input, 0, part.start, 0)
        number += sum(1 for _ in _lines(before, _line_bound(part.input)))
    return f"{part.input.path}, line {number}"
