"""How ZeRO-3 averages gradients over gloo ranks: in portions that pass through one buffer.

DeepSpeed hands over all that a bucket holds, and a large parameter whole; it lays the parts of the ranks side by side
in a copy, and gloo works on another one. For the experts of a layer either is as much as their gradient. On a GPU the
first is a bucket at most, and NCCL has no second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import stage3
from torch import Tensor


def reduce_in_portions(elements: int) -> None:
    """Let ZeRO-3 reduce gradients so in this process, so many elements at once."""
    stage3.reduce_scatter_coalesced = PortionedAverage(elements)


class _Piece(NamedTuple):
    """Columns of a portion: the same stretch of every rank's part of a gradient, shorter or empty in the last parts."""

    of_rank: list[Tensor]
    column: int


class PortionedAverage:
    """Averages gradients over the ranks of a group; every rank gets its part of each.

    A part is ceil(n / ranks) elements of a flattened gradient of n, the last ones what is left.
    """

    def __init__(self, elements: int) -> None:
        """elements: of a portion, taken from the parts of all ranks alike."""
        self._elements = elements
        self._buffer = torch.empty(0)

    def __call__(self, gradients: Sequence[Tensor], group: Any = None) -> list[Tensor]:
        """This rank's part of each average, a view of the gradient, of which this part is overwritten.

        Args:
            gradients: contiguous, of one type, the same shapes in the same order on all ranks.
        """
        ranks = dist.get_world_size(group)
        width = max(1, self._elements // ranks)
        results, pieces, column = [], [], 0
        for gradient in gradients:
            flat, length = gradient.view(-1), -(-gradient.numel() // ranks)
            parts = [flat[rank * length : (rank + 1) * length] for rank in range(ranks)]
            results.append(parts[dist.get_rank(group)])
            start = 0
            while start < length:
                taken = min(width - column, length - start)
                pieces.append(_Piece([part[start : start + taken] for part in parts], column))
                start, column = start + taken, column + taken
                if column == width:
                    self._average(pieces, column, group)
                    pieces, column = [], 0
        if pieces:
            self._average(pieces, column, group)
        return results

    def _average(self, pieces: list[_Piece], width: int, group: Any) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        example = pieces[0].of_rank[0]
        if self._buffer.numel() < (ranks + 1) * width or self._buffer.dtype != example.dtype:
            self._buffer = example.new_empty((ranks + 1) * width)
        given = self._buffer[: ranks * width].view(ranks, width).zero_()
        averaged = self._buffer[ranks * width : (ranks + 1) * width]
        for piece in pieces:
            for row, part in zip(given, piece.of_rank, strict=True):
                torch.div(part, ranks, out=row[piece.column : piece.column + part.numel()])
        dist.reduce_scatter_tensor(averaged, given.view(-1), group=group)
        for piece in pieces:
            mine = piece.of_rank[rank]
            mine.copy_(averaged[piece.column : piece.column + mine.numel()])
