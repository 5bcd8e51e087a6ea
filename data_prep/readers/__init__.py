"""Readers: one module a family of formats, behind two functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from data_prep.readers.base import Extent, Input, Record, Slice
from data_prep.readers.hub import hub_extent, read_hub
from data_prep.readers.tables import arrow_extent, parquet_extent, read_arrow, read_parquet
from data_prep.readers.text import jsonl_extent, read_jsonl, read_txt, txt_extent

_Family = tuple[Callable[[Input], Extent], Callable[[Slice], Iterator[Record]]]

_FAMILIES: dict[str, _Family] = {
    ".txt": (txt_extent, read_txt),
    ".jsonl": (jsonl_extent, read_jsonl),
    ".jsonl.gz": (jsonl_extent, read_jsonl),
    ".jsonl.zst": (jsonl_extent, read_jsonl),
    ".parquet": (parquet_extent, read_parquet),
    ".arrow": (arrow_extent, read_arrow),
}
SUFFIXES = tuple(_FAMILIES)


def extent(item: Input) -> Extent:
    """Look into an input: its text column, its size, and where it can be cut.

    Raises:
        DataError: it is not what its suffix says, or lacks a column.
    """
    return _family(item)[0](item)


def records(part: Slice) -> Iterator[Record]:
    """The records of a slice, in order.

    Raises:
        DataError: the input is damaged, naming the line, row group or record batch.
    """
    return _family(part.input)[1](part)


def _family(item: Input) -> _Family:
    if item.hub is not None:
        return hub_extent, read_hub
    return next(family for suffix, family in _FAMILIES.items() if item.path.lower().endswith(suffix))
