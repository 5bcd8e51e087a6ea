"""The pages of a parquet column, told from their headers alone: how much memory a value can take before it is decoded.

The footer of a file says what pages take before compression, but a dictionary page counts once however often its
entries are used. No value is longer than the largest page of its column: a dictionary page holds its entries whole, and
so does a data page its values, or the beginnings that they share.

A header is a struct in Thrift's compact protocol, `PageHeader` of the format's parquet.thrift.
"""

from __future__ import annotations

from typing import Any, BinaryIO, NamedTuple

_DICTIONARY_PAGE = 2
_BY_INDEX = (2, 8)  # PLAIN_DICTIONARY, RLE_DICTIONARY
# Fields of PageHeader, and of the headers in it.
_TYPE, _UNCOMPRESSED, _COMPRESSED = 1, 2, 3
_DATA, _DICTIONARY, _DATA_V2 = 5, 7, 8
_VALUES, _ENCODING, _ENCODING_V2 = 1, 2, 4
_HEADER_BYTES = (256, 1 << 14, 1 << 20)  # mostly some 30; statistics make them longer
_STOP, _TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _STRUCT, _INTEGERS = 0, 1, 2, 3, 7, 8, 12, (4, 5, 6)


class Page(NamedTuple):
    """`bytes` before compression; `by_index`: its values are numbers of entries of the dictionary."""

    is_dictionary: bool
    bytes: int
    values: int
    by_index: bool


def pages(file: BinaryIO, chunk: Any) -> list[Page]:
    """All pages of a column chunk (`pyarrow.parquet.ColumnChunkMetaData`), the dictionary first if there is one.

    Where headers are not as expected, one page as large as the whole chunk, which bounds a value just as well.
    """
    at = _start(chunk)
    found: list[Page] = []
    values = 0
    try:
        while values < chunk.num_values:
            page, at = _page(file, at)
            found.append(page)
            values += 0 if page.is_dictionary else page.values
    except (IndexError, KeyError, ValueError, TypeError):
        return [Page(False, chunk.total_uncompressed_size, chunk.num_values, False)]
    return found


def dictionary(file: BinaryIO, chunk: Any) -> Page | None:
    """The dictionary page of a column chunk, if it has one."""
    try:
        page, _ = _page(file, _start(chunk))
    except (IndexError, KeyError, ValueError, TypeError):
        return None
    return page if page.is_dictionary else None


def _start(chunk: Any) -> int:
    first = chunk.dictionary_page_offset
    return int(min(first, chunk.data_page_offset) if first else chunk.data_page_offset)


def _page(file: BinaryIO, at: int) -> tuple[Page, int]:
    """The page whose header begins at byte `at`, and where the next one begins.

    Raises:
        IndexError, KeyError, ValueError, TypeError: there is no such header.
    """
    for size in _HEADER_BYTES:
        file.seek(at)
        try:
            header, length = _struct(file.read(size), 0)
            break
        except IndexError:
            if size == _HEADER_BYTES[-1]:
                raise
    is_dictionary = header[_TYPE] == _DICTIONARY_PAGE
    field = _DICTIONARY if is_dictionary else _DATA_V2 if _DATA_V2 in header else _DATA
    inner = header.get(field, {_VALUES: 0, _ENCODING: 0, _ENCODING_V2: 0})  # an index page has none of them
    by_index = not is_dictionary and inner[_ENCODING_V2 if field == _DATA_V2 else _ENCODING] in _BY_INDEX
    if min(header[_UNCOMPRESSED], header[_COMPRESSED], inner[_VALUES]) < 0:
        raise ValueError("a negative size")
    page = Page(is_dictionary, header[_UNCOMPRESSED], inner[_VALUES], by_index)
    return page, at + length + header[_COMPRESSED]


def _struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """The fields of a struct by number (of strings nothing is kept), and where it ends."""
    fields: dict[int, Any] = {}
    number = 0
    while True:
        head, at = data[at], at + 1
        kind = head & 15
        if kind == _STOP:
            return fields, at
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(kind, data, at)


def _value(kind: int, data: bytes, at: int) -> tuple[Any, int]:
    if kind in (_TRUE, _FALSE):
        return kind == _TRUE, at
    if kind in _INTEGERS:
        return _integer(data, at)
    if kind == _STRUCT:
        return _struct(data, at)
    if kind == _BINARY:
        length, at = _varint(data, at)
    elif kind in (_BYTE, _DOUBLE):
        length = 1 if kind == _BYTE else 8
    else:
        raise ValueError(f"a field of type {kind}")
    data[at + length]  # the byte behind it: a header never ends with a value
    return None, at + length


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A signed integer, zigzag."""
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
