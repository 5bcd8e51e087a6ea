"""Loss terms as sums and counts, and the objective made of them.

A term is a sum over the positions it counts, never a mean: sums and counts add up over ranks and micro-batches, so that
the loss of a global batch, and its gradient, do not depend on how the batch was split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxt_dist.model.moe import RoutingTerms


class StageOutput(NamedTuple):
    """What a stage computes from one micro-batch; the order of terms is the stage's `terms`.

    sums_J: float32, summed losses, differentiable.
    hits_J: int64, correct predictions per term (0 where a term predicts nothing).
    expert_counts_ME: int64, choices per MoE layer and expert; of a stage without experts [0, 0].
    """

    sums_J: Tensor
    hits_J: Tensor
    expert_counts_ME: Tensor


def sums_by(group_N: Tensor, groups: int, losses_N: Tensor, hits_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of losses (float32) and hits (int64) by group; in one order, as additions to places have none on a GPU.

    Args:
        group_N: int64, the group of each target; what is not below `groups` is of none.
    """
    is_of_JN = torch.arange(groups, device=group_N.device).unsqueeze(1) == group_N
    return torch.where(is_of_JN, losses_N, 0.0).sum(1), (is_of_JN & hits_N).sum(1)


def objective(sums_J: Tensor, counts_J: Tensor, weights_J: Tensor) -> Tensor:
    """sum of weight * sum / count, with the counts of the whole global batch; a term that counts nothing is 0."""
    return (weights_J * sums_J / counts_J.clamp_min(1)).sum()


def mean_over_layers(routing: RoutingTerms) -> tuple[Tensor, Tensor]:
    """(balance, z) sums over tokens, averaged over MoE layers: balance / tokens is 1 for perfectly even experts."""
    return routing.balance_M.mean(), routing.z_M.mean()


def load_fractions(counts_ME: Tensor) -> Tensor:
    """Each layer's token fractions (float32, rows sum to 1); uniform for a layer that routed nothing yet."""
    totals_M1 = counts_ME.sum(-1, keepdim=True)
    uniform = 1.0 / max(1, counts_ME.shape[-1])
    return torch.where(totals_M1 > 0, counts_ME / totals_M1.clamp_min(1), uniform).float()
