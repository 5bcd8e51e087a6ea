"""How ZeRO-3 gathers weights and averages gradients over gloo ranks: without copies of what is large.

DeepSpeed hands over all that a bucket holds, and a large parameter whole; it lays the parts of the ranks side by side
in a copy, and gloo works on another one, as it does where all ranks gather at once. For the experts of a layer each is
as much as their gradient, or their weights. Where one rank sends to all, or all to one, gloo works in place. On a GPU
the first is a bucket at most, and NCCL has no second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import partition_parameters, stage3
from torch import Tensor


def exchange_in_place(elements: int) -> None:
    """Let ZeRO-3 gather and reduce so in this process, and reduce so many elements at once."""
    stage3.reduce_scatter_coalesced = PortionedAverage(elements)
    partition_parameters._dist_allgather_fn = gather


def gather(part: Tensor, whole: Tensor, group: Any = None) -> Exchanges:
    """Begin to fill `whole` with the parts of all ranks in their order; the handle waits for it."""
    rows = whole.view(dist.get_world_size(group), -1)
    rows[dist.get_rank(group)].copy_(part)
    return Exchanges([dist.broadcast(row, group=group, group_src=rank, async_op=True) for rank, row in enumerate(rows)])


class Exchanges:
    """Exchanges that were begun, as one handle."""

    def __init__(self, begun: Sequence[Any]) -> None:
        self._begun = begun

    def wait(self) -> None:
        """Until all of them are done."""
        for exchange in self._begun:
            exchange.wait()


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
        if self._buffer.numel() < ranks * width or self._buffer.dtype != example.dtype:
            self._buffer = example.new_empty(ranks * width)
        given = self._buffer[: ranks * width].view(ranks, width).zero_()
        for piece in pieces:
            for row, part in zip(given, piece.of_rank, strict=True):
                torch.div(part, ranks, out=row[piece.column : piece.column + part.numel()])
        Exchanges(
            [dist.reduce(row, group=group, group_dst=owner, async_op=True) for owner, row in enumerate(given)]
        ).wait()
        averaged = given[rank]
        for piece in pieces:
            mine = piece.of_rank[rank]
            mine.copy_(averaged[piece.column : piece.column + mine.numel()])
