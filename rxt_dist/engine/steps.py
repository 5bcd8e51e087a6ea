"""What every engine does around forward and backward, whatever shards the parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import MicroBatch, Stage, TermTotals
from rxt_dist.engine.routing_state import RoutingState
from rxt_dist.losses import StageOutput
from rxt_dist.model.moe import MoEFeedForward


class StepSums:
    """Counts of the global batch before the step, sums of its losses after it.

    counts_T (float32 on the device) are known before any forward pass, from the data alone: they are the denominators
    of the objective, so that every micro-batch's gradient is already that of the global mean.
    """

    def __init__(self, stage: Stage, micros: Sequence[MicroBatch], ranks: Collectives, routing: RoutingState) -> None:
        self.ranks = ranks
        local = torch.stack([stage.counts(micro) for micro in micros]).sum(0)
        self._counts_T = ranks.sum(local)
        self.counts_T = self._counts_T.float()
        self.weights_T = stage.weights().to(ranks.device)
        self._sums_T = torch.zeros_like(self._counts_T)
        self._hits_T = torch.zeros_like(self._counts_T, dtype=torch.int64)
        self._expert_counts_ME = torch.zeros_like(routing.counts_ME)

    def add(self, output: StageOutput) -> None:
        """Take in one micro-batch's output."""
        self._sums_T += output.sums_T.detach()
        self._hits_T += output.hits_T
        self._expert_counts_ME += output.expert_counts_ME

    def totals(self) -> tuple[TermTotals, Tensor]:
        """Loss totals and expert counts over all ranks, by one reduction."""
        packed = torch.cat([self._sums_T, self._hits_T.double(), self._expert_counts_ME.double().flatten()])
        packed = self.ranks.sum(packed)
        terms = self._sums_T.numel()
        totals = TermTotals(packed[:terms], self._counts_T, packed[terms : 2 * terms].long())
        return totals, packed[2 * terms :].long().view_as(self._expert_counts_ME)


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
    return sums.totals()[0]


def moe_blocks(model: nn.Module) -> list[Any]:
    """The routed blocks of all MoE layers, in order; ours or the engine's replacement."""
    return [module.routed for module in model.modules() if isinstance(module, MoEFeedForward)]


def set_expert_bias(blocks: Sequence[Any], bias_ME: Tensor | None) -> None:
    """Let each routed block add its row of `bias_ME` (a view: updates in place reach it) to its routing choice."""
    for layer, block in enumerate(blocks):
        block.expert_bias = None if bias_ME is None else bias_ME[layer]
