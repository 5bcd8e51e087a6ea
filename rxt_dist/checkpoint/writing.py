"""What one rank writes of a training state, and the checksum of it."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rxt_dist.checkpoint.daemons import map_on_daemons
from rxt_dist.checkpoint.pieces import ROUTING_FILE, rank_file
from rxt_dist.checkpoint.store import CheckpointStore, FileRecord
from rxt_dist.checkpoint.tensor_file import write_tensors
from rxt_dist.engine.interface import Fragment
from rxt_dist.errors import CheckpointError, DiskError, UserError

T = TypeVar("T")

# Elements of a piece that are checksummed at once; what is made of them stays in a processor's cache.
_CHECKSUM_ELEMENTS = 1 << 17
# A host takes them as rows of so many columns.
_CHECKSUM_COLUMNS = 1 << 12
# A rank begins another file beyond this: one thread hashes 1 to 2 GB/s, which is less than many disks read.
_FILE_BYTES = 1 << 29
# Files that a rank writes and hashes at once while training waits.
THREADS = 4


@dataclass(frozen=True)
class Run:
    """Successive float32 elements [n] of a flattened parameter or moment, from element `start` on."""

    kind: str
    name: str
    start: int
    values: Tensor

    def part(self, first: int, end: int) -> Run:
        """Its elements [first, end)."""
        return Run(self.kind, self.name, self.start + first, self.values[first:end])


def runs_of(fragments: Iterable[Fragment]) -> Iterator[Run]:
    """The runs of fragments, in the order of a file."""
    for fragment in fragments:
        for kind, tensor in fragment.tensors.items():
            yield Run(kind, fragment.name, fragment.start, tensor)


@dataclass(frozen=True)
class Share:
    """What one rank writes: pieces that nobody else writes and, on rank 0, the routing state."""

    rank: int
    fragments: Sequence[Fragment]
    routing: Mapping[str, Tensor]

    @property
    def runs(self) -> list[Run]:
        """All pieces, in the order in which they are written."""
        return list(runs_of(self.fragments))

    @property
    def bytes(self) -> int:
        """Of all pieces."""
        return sum(4 * run.values.numel() for run in self.runs)

    def write(self, store: CheckpointStore, step: int, threads: int = THREADS) -> list[FileRecord]:
        """Write the files of this rank into the folder of `step` and make them durable."""
        folder = store.unfinished_folder(step)
        files: list[tuple[Path, Mapping[str, Tensor]]] = [
            (folder / rank_file(self.rank, part), views) for part, views in enumerate(self._files())
        ]
        if self.rank == 0:
            files.append((folder / ROUTING_FILE, self.routing))
        return map_on_daemons(lambda file: store.record(file[0], write_tensors(*file)), files, threads)

    def checksum(self, threads: int = THREADS) -> int:
        """This rank's part of the sum over all weights and moments of bits * place, modulo 2^64: the sum of all parts
        is equal for equal state on any topology."""
        return wrapped(sum(map_on_daemons(checksum, self.runs, threads)))

    def _files(self) -> Iterator[dict[str, Tensor]]:
        """Pieces by the file that they go into; one file at least."""
        views: dict[str, Tensor] = {}
        size = 0
        for run in self.runs:
            if size + 4 * run.values.numel() > _FILE_BYTES and views:
                yield views
                views, size = {}, 0
            views[f"{run.kind}|{run.name}|{run.start}"] = run.values
            size += 4 * run.values.numel()
        yield views


def checksum(run: Run) -> int:
    """A run's part of the sum: that of a whole is the sum of those of its parts."""
    total = _host_sum if run.values.device.type == "cpu" else _device_sum
    return total(run.values.detach().view(torch.int32), run.start) * (zlib.crc32(f"{run.kind}|{run.name}".encode()) | 1)


def _device_sum(values: Tensor, start: int) -> int:
    """The sum of values [n] * (2 * place + 1), places from `start` on, modulo 2^64.

    int64 products and sums wrap around, which is what a checksum wants.
    """
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    odd = torch.arange(min(_CHECKSUM_ELEMENTS, values.numel()), dtype=torch.int64, device=values.device) * 2 + 1
    for first in range(0, values.numel(), _CHECKSUM_ELEMENTS):
        bits = values[first : first + _CHECKSUM_ELEMENTS].to(torch.int64)
        total += 2 * (start + first) * bits.sum()
        total += bits.mul_(odd[: len(bits)]).sum()
    return int(total.item())


def _host_sum(values: Tensor, start: int) -> int:
    """As `_device_sum`, on one processor and in half the time: sums of rows and columns are weighed, not elements.

    numpy, since torch would begin as many threads in each of ours as the machine has processors.
    """
    found, total, columns = values.numpy(), 0, min(_CHECKSUM_COLUMNS, _CHECKSUM_ELEMENTS)
    block, whole = columns * (_CHECKSUM_ELEMENTS // columns), len(found) - len(found) % columns
    room = np.empty(min(block, max(whole, columns)), np.int64)
    weights = 2 * np.arange(max(columns, block // columns), dtype=np.int64)
    cuts = [*range(0, whole, block), whole, len(found)]
    for first, end in pairwise(cuts):  # The last of them is less than a row.
        values_NC = found[first:end].reshape(-1, min(columns, end - first) or 1)
        bits_NC = room[: values_NC.size].reshape(values_NC.shape)
        np.copyto(bits_NC, values_NC)
        rows_N, columns_C = bits_NC.sum(1), bits_NC.sum(0)
        total += int((columns_C * weights[: len(columns_C)]).sum()) + (2 * (start + first) + 1) * int(rows_N.sum())
        total += columns * int((rows_N * weights[: len(rows_N)]).sum())
    return total


def wrapped(total: int) -> int:
    """A sum modulo 2^64, as a signed number of 64 bits."""
    return (total + 2**63) % 2**64 - 2**63


def writing_errors(rank: int, action: Callable[[], T]) -> T:
    """What the system or a library says of writing becomes an error for a person.

    Raises:
        DiskError: the disk is full.
        CheckpointError: anything else.
    """
    try:
        return action()
    except UserError:
        raise
    except Exception as error:
        text = f"Writing the checkpoint failed on rank {rank}: {type(error).__name__}: {error}."
        # EFBIG is a limit on the size of files, which root and quotas set.
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise (DiskError if full else CheckpointError)(f"{text} Earlier checkpoints are untouched.") from error
