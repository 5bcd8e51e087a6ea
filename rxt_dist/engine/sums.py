"""What every engine does around forward and backward, whatever shards the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import TermTotals
from rxt_dist.engine.routing import RoutingState
from rxt_dist.losses import StageOutput
from rxt_dist.stages.base import MicroBatch, Stage, to_device


class StepSums:
    """Counts of the global batch before the step, sums of its losses after it.

    counts_J (float32 on the device) are known before any forward pass, from the data alone: they are the denominators
    of the objective, so that every micro-batch's gradient is already that of the global mean.
    expert_counts_ME: int64 on the device, over all ranks once `reduce` has been called.
    """

    def __init__(self, stage: Stage, micros: Sequence[MicroBatch], ranks: Collectives, routing: RoutingState) -> None:
        self.ranks = ranks
        self.terms = len(stage.terms)
        known = [torch.tensor([micro.tokens, micro.pairs], dtype=torch.float64) for micro in micros]
        counted = [stage.counts(micro) for micro in micros]
        local = torch.cat([torch.stack(counted).sum(0), torch.stack(known).sum(0)])
        # Counts of all terms, tokens and pairs. A copy that waited would wait for the update of the step before.
        self._known = ranks.sum(to_device(local, ranks.device))
        self.counts_J = self._known[: self.terms].float()
        self.weights_J = to_device(stage.weights(), ranks.device)
        self._sums_J = torch.zeros(self.terms, dtype=torch.float64, device=ranks.device)
        self._hits_J = torch.zeros(self.terms, dtype=torch.int64, device=ranks.device)
        self.expert_counts_ME = torch.zeros_like(routing.counts_ME)

    def add(self, output: StageOutput) -> None:
        """Take in one micro-batch's output."""
        self._sums_J += output.sums_J.detach()
        self._hits_J += output.hits_J
        self.expert_counts_ME += output.expert_counts_ME

    def reduce(self) -> None:
        """Sum over all ranks, by one reduction, without asking the device for anything."""
        local = [self._sums_J, self._hits_J.double(), self.expert_counts_ME.double().flatten()]
        self._reduced = self.ranks.sum(torch.cat(local))
        self.expert_counts_ME = self._reduced[2 * self.terms :].long().view_as(self.expert_counts_ME)

    def read(self, *further: Tensor) -> tuple[TermTotals, Tensor, list[float]]:
        """Totals, expert counts and further scalars in host memory: the one wait of a step for its device."""
        scalars = [value.double().reshape(1).to(self.ranks.device) for value in further]
        host = torch.cat([self._reduced, self._known, *scalars]).cpu()
        terms, experts = self.terms, self.expert_counts_ME.numel()
        sums_J, hits_J, chosen, known, others = host.split([terms, terms, experts, terms + 2, len(scalars)])
        tokens, pairs = (int(value) for value in known[terms:])
        totals = TermTotals(sums_J, known[:terms], hits_J.long(), tokens, pairs)
        return totals, chosen.long().view_as(self.expert_counts_ME), others.tolist()


@torch.no_grad()
def evaluate_stage(
    module: nn.Module,
    stage: Stage,
    forward: Callable[[Any, Tensor], StageOutput],
    micros: Sequence[MicroBatch],
    ranks: Collectives,
    routing: RoutingState,
) -> TermTotals:
    """Loss totals of the micro-batches of all ranks, by `forward`, with `module` in evaluation mode."""
    module.eval()
    sums = StepSums(stage, micros, ranks, routing)
    for micro in micros:
        sums.add(forward(micro.to(ranks.device), routing.load_ME))
    sums.reduce()
    return sums.read()[0]
