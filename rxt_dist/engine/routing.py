"""What the routers of all layers remember between steps: loads for the balance loss, biases for bias balancing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from rxt_dist.config.run import TrainConfig
from rxt_dist.losses import load_fractions
from rxt_dist.model.moe import MoEFeedForward


class RoutingState:
    """Expert counts of the last whole global batch, and the routing biases made from them.

    counts_ME: int64 choices per MoE layer and expert.
    load_ME: the same as fractions, for the next batch's balance loss.
    bias_ME: float32, or None when balancing is left to the loss.
    """

    def __init__(self, layers: int, experts: int, device: torch.device, bias_rate: float | None) -> None:
        self.bias_rate = bias_rate
        self.counts_ME = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self.bias_ME = None if bias_rate is None else torch.zeros(layers, experts, device=device)
        self.load_ME = load_fractions(self.counts_ME)

    @classmethod
    def of(cls, model: nn.Module, train: TrainConfig, device: torch.device) -> Self:
        """For the routed blocks of `model`, ours or an engine's, which add their row of the biases to their choice.

        A model without routed blocks has none of all this: M and E are 0.
        """
        blocks = routed_blocks(model)
        bias_rate = train.bias_rate if train.balancing == "bias" else None
        state = cls(len(blocks), blocks[0].num_experts if blocks else 0, device, bias_rate)
        for layer, block in enumerate(blocks):
            # A view: updates in place reach it.
            block.set_choice_bias(None if state.bias_ME is None else state.bias_ME[layer])
        return state

    def update(self, counts_ME: Tensor) -> None:
        """Take over the counts of a global batch whose update was applied.

        Bias balancing (Wang et al. 2024, arXiv 2408.15664): an expert below its layer's mean load gains bias_rate, one
        above loses it.
        """
        self.counts_ME = counts_ME
        self.load_ME = load_fractions(counts_ME)
        if self.bias_ME is not None and self.bias_rate is not None:
            counts = counts_ME.double()
            self.bias_ME += self.bias_rate * torch.sign(counts.mean(-1, keepdim=True) - counts).float()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        state = {"expert_counts": self.counts_ME}
        if self.bias_ME is not None:
            state["expert_bias"] = self.bias_ME
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """From a checkpoint, whatever balancing it was written with."""
        self.counts_ME = state["expert_counts"].to(self.counts_ME.device)
        self.load_ME = load_fractions(self.counts_ME)
        if self.bias_ME is not None and "expert_bias" in state:
            self.bias_ME.copy_(state["expert_bias"])


def routed_blocks(model: nn.Module) -> list[Any]:
    """The routed blocks of all MoE layers, in order; ours or the engine's replacement."""
    return [module.routed for module in model.modules() if isinstance(module, MoEFeedForward)]
