"""The tensors of a checkpoint, found by the place that they have in the model's parameters."""

from __future__ import annotations

import threading
from bisect import bisect_right, insort
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from rxt_dist.checkpoint.reading import OpenFiles
from rxt_dist.checkpoint.store import Checkpoint
from rxt_dist.errors import CheckpointError

ROUTING_FILE = "routing.safetensors"


@dataclass(frozen=True)
class _Piece:
    """A run of a flattened parameter: its first element and length, and the byte of a file where it begins."""

    start: int
    length: int
    path: Path
    at: int


def rank_file(rank: int, part: int = 0) -> str:
    """A file in which a rank writes what it holds; large states are spread over several parts."""
    return f"{rank_prefix(rank)}-{part:03d}.safetensors" if part else f"{rank_prefix(rank)}.safetensors"


def rank_prefix(rank: int) -> str:
    """What the names of a rank's files begin with."""
    return f"rank-{rank:05d}"


class SavedPieces:
    """All pieces of a checkpoint, looked for in one file after another until they are found. Threads may share it.

    A rank of 512 that goes on with the layout it had finds everything in its own file; the descriptions of all files
    would be some three million pieces, read by every rank.
    """

    def __init__(self, checkpoint: Checkpoint, own: str = "") -> None:
        """own: what the names of the files begin with that are looked into first."""
        self._checkpoint = checkpoint
        names = [record.name for record in checkpoint.files if record.name != ROUTING_FILE]
        # Taken from the end.
        self._unopened = sorted(names, key=lambda name: (name.startswith(own), name))
        self._files = OpenFiles()
        self._lock = threading.Lock()
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)

    @property
    def places(self) -> set[tuple[str, str]]:
        """(kind, parameter) of all that the checkpoint holds."""
        while self._open_next():
            pass
        return set(self._pieces)

    @property
    def names_so_far(self) -> set[str]:
        """Parameters of the files that were opened."""
        return {name for _, name in self._pieces}

    def _open_next(self) -> bool:
        """Take in the pieces of one more file; False if there is none."""
        if not self._unopened:
            return False
        path = self._checkpoint.path / self._unopened.pop()
        for key, place in self._files.places(path).items():
            kind, name, start = key.split("|")
            piece = _Piece(int(start), place.length, path, place.at)
            insort(self._pieces[kind, name], piece, key=_start_of)
        return True

    def _piece_at(self, place: tuple[str, str], at: int) -> _Piece | None:
        """The piece that holds element `at` of a flattened parameter."""
        with self._lock:
            return self._found(place, at)

    def _found(self, place: tuple[str, str], at: int) -> _Piece | None:
        while True:
            pieces = self._pieces.get(place, [])
            index = bisect_right(pieces, at, key=_start_of) - 1
            if index >= 0 and at < pieces[index].start + pieces[index].length:
                return pieces[index]
            if not self._open_next():
                return None

    def fill(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Copy elements [start, start + n) of a parameter's weight or moment into `target` [n].

        Raises:
            CheckpointError: the checkpoint lacks some of them.
        """
        at, end = start, start + target.numel()
        while at < end:
            piece = self._piece_at((kind, name), at)
            if piece is None:
                raise CheckpointError(
                    f"Checkpoint {self._checkpoint.path} lacks elements {at} to {end} of '{name}' ({kind}). It was "
                    "written by a run with another model or stage; resume it with the configuration it has."
                )
            stop = min(end, piece.start + piece.length)
            self._files.read(piece.path, piece.at + 4 * (at - piece.start), target[at - start : stop - start])
            at = stop


def _start_of(piece: _Piece) -> int:
    return piece.start
