"""Datasets of the Hugging Face `datasets` library: by name from the hub or its cache, or from a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_prep.readers.base import Extent, HubDataset, Input, Record, Slice, language_columns, settle_columns
from data_prep.readers.tables import batch_records, require_text
from rxt_dist.errors import DataError

_BATCH_ROWS, _BATCH_BYTES = 1000, 8 << 20


def hub_extent(item: Input) -> Extent:
    """The input with the dataset's size and fingerprint; it can be cut at any row.

    Raises:
        DataError: the dataset cannot be loaded, or lacks a column.
    """
    table = _load(item.path, _asked(item))
    item = settle_columns(item, table.column_names)
    stored = table.data.table.column(item.text_column)
    require_text(item, table.data.table.schema)
    text_bytes = stored.nbytes * len(table) // max(len(stored), 1)
    item = replace(item, bytes=text_bytes, fingerprint=f"{table._fingerprint}-{len(table)}")
    return Extent(item, text_bytes, end=len(table))


def read_hub(part: Slice) -> Iterator[Record]:
    """The rows `start` to `stop`.

    Raises:
        DataError: the dataset cannot be loaded any more, or is another one than was planned.
    """
    item = part.input
    table = _load(item.path, _asked(item))
    found = f"{table._fingerprint}-{len(table)}"
    if found != item.fingerprint:
        raise DataError(f"Dataset {item.name} is not the one that was planned: {found} instead of {item.fingerprint}.")
    columns = [str(item.text_column), *language_columns(item, table.column_names)]
    chosen = table.select_columns(columns).with_format("arrow")
    average = max(part.text_bytes // max(part.stop - part.start, 1), 1)
    step = max(1, min(_BATCH_ROWS, _BATCH_BYTES // average))
    for row in range(part.start, part.stop, step):
        begin = row
        for batch in chosen[row : min(row + step, part.stop)].to_batches():
            yield from batch_records(item, batch, begin)
            begin += batch.num_rows


def _asked(item: Input) -> HubDataset:
    assert item.hub is not None
    return item.hub


@lru_cache(maxsize=4)
def _load(path: str, asked: HubDataset) -> Any:
    """The dataset, prepared in the library's cache by the first process that asks."""
    import datasets

    try:
        if any((Path(path) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(path)
            return saved[asked.split] if isinstance(saved, datasets.DatasetDict) else saved
        files = list(asked.data_files) or None
        return datasets.load_dataset(path, asked.config, revision=asked.revision, split=asked.split, data_files=files)
    except Exception as error:  # The library, and the loaders behind it, raise errors of many kinds.
        request = ", ".join(f"{key} {value!r}" for key, value in vars(asked).items() if value)
        raise DataError(
            f"The dataset {path} ({request}) cannot be loaded: {type(error).__name__}: {_first_line(error)} "
            f"Check name, config, revision, split and data_files. Without network it must lie in the cache that "
            f"HF_HOME names (set HF_HUB_OFFLINE=1 to use that alone), or in a local folder named as `dataset`."
        ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "(no message)")
