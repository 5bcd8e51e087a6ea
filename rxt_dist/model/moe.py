"""Mixture-of-experts feed-forward: router, routed experts, shared experts.

`RoutedExperts` is the part that the engine's expert parallelism may replace; it takes [B, T, D] and returns the output
with its router logits, as the engine's layer does. Shared experts and the global bias stay outside it, because that
layer knows neither softmax-gated shared experts nor an expert bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.config.model import ModelConfig, MoEConfig
from rxt_dist.model.experts import ExpertStack, count_experts


@dataclass(frozen=True)
class RoutingInputs:
    """What a forward pass needs to account for its routing.

    valid_N: bool, False for padding, which is routed but never counted.
    load_ME: float32, each MoE layer's token fractions in the last whole global batch (rows sum to 1). They carry no
        gradient, so the balance loss is the same for every split of a batch over ranks and micro-batches.
    """

    valid_N: Tensor
    load_ME: Tensor


class RoutingTerms(NamedTuple):
    """Sums over the valid tokens of a pass; with one MoE layer the leading axis M is absent.

    balance_M: E * sum_t sum_e load_e * p_te, differentiable (the Switch loss once divided by the token count).
    z_M: sum_t logsumexp(logits_t)^2, differentiable.
    counts_ME: int64, choices per expert: valid tokens * K in all.
    """

    balance_M: Tensor
    z_M: Tensor
    counts_ME: Tensor


def select_experts(logits_NE: Tensor, active: int, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Probabilities p = softmax over all experts (float32 [N, E]) and the top K of p + bias (int64 [N, K])."""
    probs_NE = logits_NE.softmax(dim=-1, dtype=torch.float32)
    choice_NE = probs_NE if bias_E is None else probs_NE + bias_E
    return probs_NE, choice_NE.topk(active, dim=-1, sorted=False).indices


class RoutedExperts(nn.Module):
    """y = sum over the top K of a_k FF_k(x), a_k = p_k / sum of the chosen p; returns (y, router logits).

    `expert_bias` is added to the probabilities for the choice only (bias-based balancing, Wang et al. 2024,
    arXiv 2408.15664); it is None unless the engine installs one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.decoder.moe
        self.num_experts = moe.experts
        self.num_experts_per_tok = moe.active
        self.gate = nn.Linear(config.dim, moe.experts, bias=False)
        self.experts = ExpertStack(config.dim, moe)
        self.expert_bias: Tensor | None = None

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> ([B, T, D], logits [B * T, E])."""
        x_ND = x_BTD.flatten(0, 1)
        logits_NE = self.gate(x_ND)
        probs_NE, selected_NK = select_experts(logits_NE, self.num_experts_per_tok, self.expert_bias)
        chosen_NK = probs_NE.gather(1, selected_NK)
        weights_NK = chosen_NK / chosen_NK.sum(-1, keepdim=True)
        return self.experts(x_ND, selected_NK, weights_NK).view_as(x_BTD), logits_NE


class SharedExperts(nn.Module):
    """sum_s G_s FF_s(x) with G = softmax(Ws x); a single shared expert has no gate.

    All experts run as one product: gate_up [Z, 2F, D] (gate half first), down [Z, F, D].
    """

    def __init__(self, dim: int, moe: MoEConfig) -> None:
        super().__init__()
        count, hidden = moe.shared_experts, moe.shared_hidden
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * hidden, dim))
        self.down_proj = nn.Parameter(torch.empty(count, hidden, dim))
        self.gate = nn.Linear(dim, count, bias=False) if count > 1 else None
        local = moe.shared_bias == "local"
        self.gate_up_bias = nn.Parameter(torch.zeros(count, 2 * hidden)) if local else None
        self.down_bias = nn.Parameter(torch.zeros(count, dim)) if local else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        bias = None if self.gate_up_bias is None else self.gate_up_bias.flatten()
        hidden = F.linear(x_BTD, self.gate_up_proj.flatten(0, 1), bias).unflatten(-1, (self.gate_up_proj.shape[0], -1))
        gate, up = hidden.chunk(2, dim=-1)
        act_BTZF = F.silu(gate) * up
        share_BTZ = x_BTD.new_ones(*x_BTD.shape[:-1], 1)
        if self.gate is not None:
            share_BTZ = self.gate(x_BTD).softmax(-1, dtype=torch.float32).to(x_BTD.dtype)
        # The share multiplies before the down-projection, which is linear: one product then sums over the experts.
        out_BTD = (act_BTZF * share_BTZ.unsqueeze(-1)).flatten(-2) @ self.down_proj.flatten(0, 1)
        return out_BTD if self.down_bias is None else out_BTD + share_BTZ @ self.down_bias


class MoEFeedForward(nn.Module):
    """Routed plus shared experts, each with its global bias where the mode says so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.decoder.moe
        self.active = moe.active
        self.routed = RoutedExperts(config)
        self.shared = SharedExperts(config.dim, moe) if moe.shared_experts else None
        self.global_bias = nn.Parameter(torch.zeros(config.dim)) if moe.bias == "global" else None
        shared_global = moe.shared_experts and moe.shared_bias == "global"
        self.shared_bias = nn.Parameter(torch.zeros(config.dim)) if shared_global else None

    def forward(
        self, x_BTD: Tensor, valid_N: Tensor | None = None, load_E: Tensor | None = None
    ) -> tuple[Tensor, RoutingTerms | None]:
        """[B, T, D] -> ([B, T, D], routing terms where valid tokens and loads are given)."""
        out_BTD, logits_NE = self.routed(x_BTD)
        for bias_D in (self.global_bias, self.shared_bias):
            if bias_D is not None:
                out_BTD = out_BTD + bias_D
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        if valid_N is None or load_E is None:
            return out_BTD, None
        return out_BTD, routing_terms(logits_NE, valid_N, load_E, self.active, self.routed.expert_bias)


def routing_terms(
    logits_NE: Tensor, valid_N: Tensor, load_E: Tensor, active: int, bias_E: Tensor | None
) -> RoutingTerms:
    """Balance sum, z sum and expert counts of one layer, over the valid tokens, by Megatron's loss functions.

    Switch loss: Fedus et al. 2021 (arXiv 2101.03961); z-loss: Zoph et al. 2022 (arXiv 2202.08906). The functions are
    called so that they return sums over tokens: sums add up over ranks and micro-batches, means do not.
    """
    from megatron.core.transformer.moe.moe_utils import switch_load_balancing_loss_func, z_loss_func

    logits_NE = logits_NE.float()
    probs_NE, selected_NK = select_experts(logits_NE, active, bias_E)
    balance = switch_load_balancing_loss_func(
        probs_NE, load_E, total_num_tokens=1, topk=1, num_experts=load_E.numel(), moe_aux_loss_coeff=1.0,
        padding_mask=valid_N,
    )  # fmt: skip
    z_mean = z_loss_func(logits_NE, 1.0, padding_mask=~valid_N)
    # Padding is counted in an extra bin, so that no shape depends on the data.
    experts = load_E.numel()
    binned_NK = torch.where(valid_N.unsqueeze(1), selected_NK, experts)
    return RoutingTerms(balance, z_mean * valid_N.sum(), count_experts(binned_NK, experts + 1)[:experts])
