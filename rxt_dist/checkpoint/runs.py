"""What a training state consists of, however ranks share it: runs of numbers, each with its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from rxt_dist.engine.interface import Fragment


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
