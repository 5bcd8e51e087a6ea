"""Megatron's `.bin/.idx`, read as megatron-core's own IndexedDataset lays them out.

Without that library: it imports torch, which each worker process would wait and have memory for. And it trusts its
files: a `.bin` that is cut off, or belongs to another `.idx`, gives wrong ids or an error hours later. Here headers,
sizes and offsets are checked before anything is read.
"""

from __future__ import annotations

import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
        with readable(self.idx):
            self._type, sequences, bounds = _checked_header(self.idx)
            index, at = np.memmap(self.idx, dtype=np.uint8, mode="r"), _HEADER.size
        with readable(self.bin):
            self._size = self.bin.stat().st_size
        if not self._size:
            raise DataError(f"{self.bin} holds no tokens. Tokenise the corpus again.")
        self._lengths = np.frombuffer(index, "<i4", sequences, at)
        self._pointers = np.frombuffer(index, "<i8", sequences, at + 4 * sequences)
        self._bounds = np.frombuffer(index, "<i8", bounds, at + 12 * sequences)
        self._check_offsets()

    @property
    def item_bytes(self) -> int:
        return self._type.itemsize

    @property
    def documents(self) -> int:
        return len(self._bounds) - 1

    @property
    def sequences(self) -> int:
        return len(self._lengths)

    def sequence(self, index: int) -> npt.NDArray[np.integer]:
        """The ids of one sequence; a document is one or more of them."""
        return self._ids(int(self._pointers[index]), int(self._lengths[index]))

    def _ids(self, offset: int, count: int) -> npt.NDArray[np.integer]:
        with readable(self.bin):
            found: npt.NDArray[np.integer] = np.fromfile(self.bin, dtype=self._type, count=count, offset=offset)
        if len(found) != count:
            raise DataError(f"{self.bin} ends too early: it was cut off while it was read. Copy or make it again.")
        return found

    def ranges(self, size: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int]]:
        """Consecutive ranges of documents that cover [start, stop), each of at least `size` bytes but the last."""
        stop = self.documents if stop is None else stop
        while start < stop:
            reached = self.byte_of(start) + size
            sequence = int(np.searchsorted(self._pointers, reached))
            end = int(np.searchsorted(self._bounds, sequence))
            end = min(max(end, start + 1), stop)
            yield start, end
            start = end

    def byte_of(self, document: int) -> int:
        """Where a document begins in the .bin."""
        sequence = int(self._bounds[document])
        at_end = sequence == self.sequences
        return self._size if at_end else int(self._pointers[sequence])

    def read(self, start: int, stop: int) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64]]:
        """The ids of documents [start, stop), one after another, and the length of each."""
        bounds = self._bounds[start : stop + 1]
        first, last = int(bounds[0]), int(bounds[-1])
        ends = np.concatenate(([0], np.cumsum(self._lengths[first:last], dtype=np.int64)))
        # Sequences follow each other in the .bin.
        return self._ids(self.byte_of(start), int(ends[-1])), np.diff(ends[bounds - first])

    def _check_offsets(self) -> None:
        lengths, pointers = self._lengths, self._pointers
        expected = 0
        for start in range(0, len(lengths), _SCAN):
            ends = expected + np.cumsum(lengths[start : start + _SCAN], dtype=np.int64) * self.item_bytes
            begins = np.concatenate(([expected], ends[:-1]))
            if int(lengths[start : start + _SCAN].min()) < 0 or not np.array_equal(
                begins, pointers[start : start + _SCAN]
            ):
                raise DataError(f"{self.idx} has sequences that do not follow each other in the .bin: it is damaged.")
            expected = int(ends[-1])
        if self._size != expected:
            raise DataError(
                f"{self.bin} has {self._size:,} bytes, but {self.idx.name} describes {expected:,} ({self.item_bytes} "
                f"bytes an id): the .bin is cut off, or belongs to another .idx. Copy or make both files again."
            )
        bounds = self._bounds
        if bounds[0] != 0 or bool((bounds[1:] < bounds[:-1]).any()):
            raise DataError(f"{self.idx} has documents that do not follow each other: it is damaged.")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file whose disappearance ended the block.

    Raises:
        DataError: as said.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be read any more ({error.strerror or error}): it was moved, deleted or locked meanwhile. "
            f"Put it back and run the same command again; finished units are kept."
        ) from error


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


def _checked_header(path: Path) -> tuple[np.dtype[Any], int, int]:
    """Type of the ids, number of sequences, and of bounds of documents."""
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
    if last_bound != sequences:
        raise DataError(
            f"{path} ends its documents at sequence {last_bound}, but has {sequences} sequences: it is damaged. Copy "
            f"or make it again."
        )
    return np.dtype(kind).newbyteorder("<"), sequences, bounds
