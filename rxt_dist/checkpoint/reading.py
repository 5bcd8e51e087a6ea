"""Tensors of a checkpoint's files, read by the system right into the tensors that they fill.

The safetensors library maps a file into memory and copies a part of it twice, and a page of new memory costs more than
what is copied into it.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rxt_dist.errors import CheckpointError
from rxt_dist.files import patiently

# Elements that go to a device, or become another type, at once (4 MB).
_BLOCK_ELEMENTS = 1 << 20
# Files that a thread has open at once; a system allows a process about a thousand, and ranks times parts may be more.
_MOST_OPEN = 64
_HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its file: its first byte, and how many float32 elements it has."""

    at: int
    length: int


class OpenFiles:
    """Files of a checkpoint, opened when they are asked for. Threads may share it.

    Each opens a file for itself: the system reads ahead for an open file, from where it was read last.
    """

    def __init__(self) -> None:
        self._open = _OpenHere()

    def places(self, path: Path) -> Mapping[str, Place]:
        """Where each tensor of a file is, by its name.

        Raises:
            CheckpointError: the file does not describe one-dimensional float32 tensors.
        """
        file = self._opened(path)
        try:
            size = int.from_bytes(file.read(0, _HEADER_LENGTH_BYTES), "little")
            first = _HEADER_LENGTH_BYTES + size
            described = json.loads(file.read(_HEADER_LENGTH_BYTES, min(size, file.bytes)))
            places = {name: _place(first, entry) for name, entry in described.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a file of float32 tensors ({error}).") from error
        return places

    def read(self, path: Path, at: int, target: Tensor) -> None:
        """Fill a tensor [n] of any device and floating type with the float32 elements from byte `at` on.

        Raises:
            CheckpointError: the file ends before.
        """
        file, target = self._opened(path), target.detach()
        if target.device.type == "cpu" and target.dtype == torch.float32 and target.is_contiguous():
            file.read_into(at, target)
            return
        room = torch.empty(min(_BLOCK_ELEMENTS, target.numel()))
        for part in target.split(_BLOCK_ELEMENTS):
            block = room[: part.numel()]
            file.read_into(at, block)
            part.copy_(block)  # Not before it has arrived does the next block take its room.
            at += 4 * part.numel()

    def _opened(self, path: Path) -> _OpenFile:
        files = self._open.files
        file = files.pop(path, None) or _OpenFile(path)
        files[path] = file
        if len(files) > _MOST_OPEN:
            del files[next(iter(files))]
        return file


class _OpenHere(threading.local):
    """Files that this thread has opened, the one that was asked for last at the end."""

    def __init__(self) -> None:
        self.files: dict[Path, _OpenFile] = {}


class _OpenFile:
    """A file that is open as long as somebody holds this."""

    _number = -1

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = patiently(partial(os.open, path, os.O_RDONLY))
        self.bytes = os.fstat(self._number).st_size

    def __del__(self) -> None:
        if self._number >= 0:
            os.close(self._number)

    def read(self, at: int, count: int) -> bytes:
        return patiently(lambda: os.pread(self._number, count, at))

    def read_into(self, at: int, target: Tensor) -> None:
        view = target.view(torch.uint8).numpy().data
        while len(view):
            count = patiently(partial(os.preadv, self._number, [view], at))
            if not count:
                raise CheckpointError(f"{self._path} ends {len(view)} bytes before its last tensor does.")
            view, at = view[count:], at + count


def _place(first: int, entry: Mapping[str, Any]) -> Place:
    (length,), (begin, end) = entry["shape"], entry["data_offsets"]
    if entry["dtype"] != "F32" or not 0 <= begin <= end or end - begin != 4 * length:
        raise ValueError(f"one is {entry['dtype']} {entry['shape']} in bytes {begin} to {end}")
    return Place(first + begin, length)
