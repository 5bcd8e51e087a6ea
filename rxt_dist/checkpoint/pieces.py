"""The tensors of a checkpoint, found by the place that they have in the model's parameters."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from rxt_dist.checkpoint.store import Checkpoint
from rxt_dist.errors import CheckpointError

ROUTING_FILE = "routing.safetensors"


@dataclass(frozen=True)
class _Piece:
    start: int
    length: int
    path: Path
    key: str


class SavedPieces:
    """All pieces of a checkpoint.

    places: (kind, parameter) of all that it holds; names: the parameters.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, Any] = {}
        pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for record in checkpoint.files:
            path = checkpoint.path / record.name
            if record.name == ROUTING_FILE:
                continue
            file = self._files[path] = safe_open(path, "pt")
            for key in file.keys():  # noqa: SIM118 - not a dict
                kind, name, start = key.split("|")
                length = file.get_slice(key).get_shape()[0]
                pieces[kind, name].append(_Piece(int(start), length, path, key))
        self._pieces = {place: sorted(found, key=lambda piece: piece.start) for place, found in pieces.items()}
        self.places = set(self._pieces)
        self.names = {name for _, name in self.places}

    def fill(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Copy elements [start, start + n) of a parameter's weight or moment into `target` [n].

        Raises:
            CheckpointError: the checkpoint lacks some of them.
        """
        pieces = self._pieces.get((kind, name), [])
        at, end = start, start + target.numel()
        index = bisect_right(pieces, at, key=lambda piece: piece.start) - 1
        while at < end:
            piece = pieces[index] if 0 <= index < len(pieces) else None
            if piece is None or not piece.start <= at < piece.start + piece.length:
                raise CheckpointError(
                    f"Checkpoint {self._checkpoint.path} lacks elements {at} to {end} of '{name}' ({kind}). It was "
                    "written by a run with another model or stage; resume it with the configuration it has."
                )
            stop = min(end, piece.start + piece.length)
            part = self._files[piece.path].get_slice(piece.key)[at - piece.start : stop - piece.start]
            target[at - start : stop - start].copy_(part)
            at, index = stop, index + 1
