"""Megatron's `.bin/.idx`, opened through megatron-core's own IndexedDataset.

It trusts its files: a `.bin` that is cut off, or belongs to another `.idx`, gives wrong ids or an error hours later. So
headers, sizes and offsets are checked before anything is read.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.errors import DataError

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, type of ids, sequences, documents + 1
_TYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
_ID_TYPES = ("uint16", "int32", "int64")
_SCAN = 1 << 20


class MegatronCorpus:
    """An open corpus whose index has been checked against its data.

    Raises:
        DataError: a file is missing, cut off, of another version, or does not hold token ids.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = plain_prefix(prefix)
        self.bin, self.idx = pair_of(prefix)
        for path in (self.bin, self.idx):
            if not path.is_file():
                raise DataError(f"{path} does not exist; a Megatron corpus is a .bin and an .idx of the same name.")
        _check_header(self.idx)
        if not self.bin.stat().st_size:
            raise DataError(f"{self.bin} holds no tokens. Tokenise the corpus again.")
        self._dataset = library().IndexedDataset(str(self.prefix))
        self.item_bytes = int(np.dtype(self._dataset.index.dtype).itemsize)
        self._check_offsets()

    @property
    def documents(self) -> int:
        return len(self._dataset.document_indices) - 1

    @property
    def sequences(self) -> int:
        return len(self._dataset)

    def sequence(self, index: int) -> npt.NDArray[np.integer]:
        """The ids of one sequence; a document is one or more of them."""
        ids: npt.NDArray[np.integer] = self._dataset[index]
        return ids

    def ranges(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of documents that cover [start, stop), each of at least `size` bytes but the last."""
        bounds, stop = self._dataset.document_indices, self.documents if stop is None else stop
        while start < stop:
            reached = self.byte_of(start) + size
            sequence = int(np.searchsorted(self._dataset.index.sequence_pointers, reached))
            end = int(np.searchsorted(bounds, sequence))
            end = min(max(end, start + 1), stop)
            yield start, end
            start = end

    def byte_of(self, document: int) -> int:
        """Where a document begins in the .bin."""
        sequence = int(self._dataset.document_indices[document])
        at_end = sequence == self.sequences
        return self.bin.stat().st_size if at_end else int(self._dataset.index.sequence_pointers[sequence])

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """The ids of documents [start, stop), one after another, and the length of each."""
        bounds = self._dataset.document_indices[start : stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        ends = np.concatenate(([0], np.cumsum(self._dataset.sequence_lengths[first:last], dtype=np.int64)))
        lengths = np.diff(ends[bounds - first])
        sequences = self._dataset[first:last] if last > first else []
        ids = np.concatenate(sequences) if sequences else np.empty(0, dtype=self._dataset.index.dtype)
        return ids, lengths

    def _check_offsets(self) -> None:
        lengths, pointers = self._dataset.sequence_lengths, self._dataset.index.sequence_pointers
        expected = 0
        for start in range(0, len(lengths), _SCAN):
            ends = expected + np.cumsum(lengths[start : start + _SCAN], dtype=np.int64) * self.item_bytes
            begins = np.concatenate(([expected], ends[:-1]))
            if int(lengths[start : start + _SCAN].min()) < 0 or not np.array_equal(
                begins, pointers[start : start + _SCAN]
            ):
                raise DataError(f"{self.idx} has sequences that do not follow each other in the .bin: it is damaged.")
            expected = int(ends[-1])
        size = self.bin.stat().st_size
        if size != expected:
            raise DataError(
                f"{self.bin} has {size:,} bytes, but {self.idx.name} describes {expected:,} ({self.item_bytes} bytes "
                f"an id): the .bin is cut off, or belongs to another .idx. Copy or make both files again."
            )
        bounds = self._dataset.document_indices
        if bounds[0] != 0 or bool((bounds[1:] < bounds[:-1]).any()):
            raise DataError(f"{self.idx} has documents that do not follow each other: it is damaged.")


def plain_prefix(prefix: Path) -> Path:
    """The prefix of a pair, where one of its two files may have been named instead."""
    return prefix.with_suffix("") if prefix.suffix in (".bin", ".idx") else prefix


def pair_of(prefix: Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx."""
    plain = plain_prefix(prefix)
    return plain.with_name(plain.name + ".bin"), plain.with_name(plain.name + ".idx")


def library() -> Any:
    """megatron-core's module; it imports torch, and warns of kernels that reading files has no use for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def _check_header(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(_HEADER.size)
        file.seek(max(file.seek(0, os.SEEK_END) - 8, 0))
        last_bound = int.from_bytes(file.read(8), "little")
    if not start.startswith(_MAGIC):
        raise DataError(f"{path} is not an index of Megatron's: it begins with {start[:9]!r}, not {_MAGIC!r}.")
    if len(start) < _HEADER.size:
        raise DataError(f"{path} ends within its header: it is cut off. Copy or make it again.")
    _, version, code, sequences, bounds = _HEADER.unpack(start)
    if version != _VERSION:
        raise DataError(f"{path} has version {version}; megatron-core reads version {_VERSION}. Make it again.")
    kind = _TYPES.get(code, f"type {code}")
    if kind not in _ID_TYPES:
        raise DataError(f"{path} describes values of {kind}; token ids are {', '.join(_ID_TYPES)}.")
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    size = path.stat().st_size
    if size == expected + sequences > expected:
        raise DataError(f"{path} is a multimodal index (it has a mode for each sequence); only text can be imported.")
    if size != expected or not bounds:
        raise DataError(
            f"{path} has {size:,} bytes, but its header ({sequences:,} sequences) means {expected:,}: it is cut off or "
            f"damaged. Copy or make it again."
        )
    # The library says of this no more than AssertionError.
    if last_bound != sequences:
        raise DataError(
            f"{path} ends its documents at sequence {last_bound}, but has {sequences} sequences: it is damaged. Copy "
            f"or make it again."
        )
