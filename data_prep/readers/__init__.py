"""Readers: one module a family of formats, behind three functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from data_prep.readers.base import Extent, Fields, Input, Record, Slice
from data_prep.readers.hub import hub_extent, read_hub
from data_prep.readers.tables import (
    arrow_extent,
    parquet_extent,
    read_arrow,
    read_arrow_objects,
    read_parquet,
    read_parquet_objects,
)
from data_prep.readers.text import jsonl_extent, read_jsonl, read_jsonl_objects, read_txt, txt_extent

Objects = Iterator[tuple[str, dict[str, Any]]]


class _Family(NamedTuple):
    extent: Callable[[Input], Extent]
    records: Callable[[Slice], Iterator[Record]]
    objects: Callable[[Input, Fields], Objects] | None = None


_LINES = _Family(jsonl_extent, read_jsonl, read_jsonl_objects)
_FAMILIES = {
    ".txt": _Family(txt_extent, read_txt),
    ".jsonl": _LINES,
    ".jsonl.gz": _LINES,
    ".jsonl.zst": _LINES,
    ".parquet": _Family(parquet_extent, read_parquet, read_parquet_objects),
    ".arrow": _Family(arrow_extent, read_arrow, read_arrow_objects),
}
_HUB = _Family(hub_extent, read_hub)
SUFFIXES = tuple(_FAMILIES)
OBJECT_SUFFIXES = tuple(suffix for suffix, family in _FAMILIES.items() if family.objects)


def extent(item: Input) -> Extent:
    """Look into an input: its text column, its size, and where it can be cut.

    Raises:
        DataError: it is not what its suffix says, or lacks a column.
    """
    return _family(item).extent(item)


def records(part: Slice) -> Iterator[Record]:
    """The texts of a slice, in order.

    Raises:
        DataError: the input is damaged, naming the line, row group or record batch.
    """
    return _family(part.input).records(part)


def objects(item: Input, fields: Fields) -> Objects:
    """(place for messages, record) of a whole input, in order: of a table the columns `fields`, of lines all there is.

    Raises:
        DataError: the input is damaged, naming the line, row group or record batch, or has none of the columns.
    """
    read = _family(item).objects
    assert read is not None, f"{item.path} holds no records"
    return read(item, fields)


def _family(item: Input) -> _Family:
    if item.hub is not None:
        return _HUB
    return next(family for suffix, family in _FAMILIES.items() if item.path.lower().endswith(suffix))
