"""What one rank writes of a training state, and the checksum of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from rxt_dist.checkpoint.checksum import checksum, wrapped
from rxt_dist.checkpoint.daemons import map_on_daemons
from rxt_dist.checkpoint.pieces import ROUTING_FILE, rank_file
from rxt_dist.checkpoint.runs import Run, runs_of
from rxt_dist.checkpoint.store import CheckpointStore, FileRecord
from rxt_dist.checkpoint.tensor_file import write_tensors
from rxt_dist.engine.interface import Fragment
from rxt_dist.errors import CheckpointError, DiskError, UserError

T = TypeVar("T")

# A rank begins another file beyond this: one thread hashes 1 to 2 GB/s, which is less than many disks read.
_FILE_BYTES = 1 << 29
# Files that a rank writes and hashes at once while training waits.
THREADS = 4


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
        """This rank's part of the state's checksum: the sum of all parts is equal for equal state on any topology."""
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
