"""Mixture-of-experts feed-forward: router, routed experts, shared experts.

`RoutedExperts` is the part that the engine's expert parallelism may replace; it takes [B, T, D] and returns the output
with its routing, as the engine's layer does. Shared experts and the global bias stay outside it, because that
layer knows neither softmax-gated shared experts nor an expert bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.config.model import ModelConfig, MoEConfig
from rxt_dist.model.experts import ExpertStack, count_experts
from rxt_dist.model.fused import Chain, weighted_swiglu


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


class Routing(NamedTuple):
    """One layer's choice of experts, made once: what dispatches tokens is what losses and counts are made of.

    logits_NE, probs_NE: float32, the router's scores and their softmax over all experts, differentiable.
    selected_NK: int64, the K chosen experts of each token.
    shares_NK: float32, the chosen experts' own probabilities, made to sum to 1, differentiable.
    """

    logits_NE: Tensor
    probs_NE: Tensor
    selected_NK: Tensor
    shares_NK: Tensor


def _choose(logits_NE: Tensor, active: int, bias_E: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    probs_NE = logits_NE.softmax(dim=-1, dtype=torch.float32)
    choice_NE = probs_NE if bias_E is None else probs_NE + bias_E
    selected_NK = choice_NE.topk(active, dim=-1, sorted=False).indices
    chosen_NK = probs_NE.gather(1, selected_NK)
    return probs_NE, selected_NK, chosen_NK / chosen_NK.sum(-1, keepdim=True)


_choice = Chain(_choose)


def select_experts(logits_NE: Tensor, active: int, bias_E: Tensor | None) -> Routing:
    """Choose the top K of p + bias, with p the softmax of the logits over all experts."""
    return Routing(logits_NE, *_choice(logits_NE, active, bias_E))


class _Float32Product(torch.autograd.Function):
    """x W^T in float32; keeps x and W as they are, and not the float32 copies that autograd would keep."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight_ED)
        return x_ND.float() @ weight_ED.float().t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x_ND, weight_ED = ctx.saved_tensors
        (grad_NE,) = grads
        grad_weight_ED = grad_NE.t() @ x_ND.float()
        return (grad_NE @ weight_ED.float()).to(x_ND.dtype), grad_weight_ED.to(weight_ED.dtype)


class RouterGate(nn.Linear):
    """The router's projection, whose logits are float32 whatever the model's type.

    Logits rounded to bfloat16 send one token in twenty to other experts and leave one in ten with an exact tie at the
    K-th place (docs/model.md has the measurement).
    """

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, D] -> float32 [N, E]."""
        logits_NE: Tensor = _Float32Product.apply(x_ND, self.weight)
        return logits_NE


class RoutedExperts(nn.Module):
    """y = sum over the top K of a_k FF_k(x), a_k = p_k / sum of the chosen p; returns (y, its routing).

    `expert_bias` is added to the probabilities for the choice only (bias-based balancing, Wang et al. 2024,
    arXiv 2408.15664); it is None unless the engine sets one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.decoder.moe
        self.num_experts = moe.experts
        self.num_experts_per_tok = moe.active
        self.gate = RouterGate(config.dim, moe.experts, bias=False)
        self.experts = ExpertStack(config.dim, moe)
        self.expert_bias: Tensor | None = None

    def set_choice_bias(self, bias_E: Tensor | None) -> None:
        """Add a bias [E] to the choice from now on; it is kept by reference and may be written to. None: add none."""
        self.expert_bias = bias_E

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Routing]:
        """[B, T, D] -> ([B, T, D], routing of its B * T tokens)."""
        x_ND = x_BTD.flatten(0, 1)
        routing = select_experts(self.gate(x_ND), self.num_experts_per_tok, self.expert_bias)
        return self.experts(x_ND, routing.selected_NK, routing.shares_NK).view_as(x_BTD), routing


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
        share_BTZ = x_BTD.new_ones(*x_BTD.shape[:-1], 1)
        if self.gate is not None:
            share_BTZ = self.gate(x_BTD).softmax(-1, dtype=torch.float32).to(x_BTD.dtype)
        # The share multiplies before the down-projection, which is linear: one product then sums over the experts.
        out_BTD = weighted_swiglu(hidden, share_BTZ).flatten(-2) @ self.down_proj.flatten(0, 1)
        return out_BTD if self.down_bias is None else out_BTD + share_BTZ @ self.down_bias


class MoEFeedForward(nn.Module):
    """Routed plus shared experts, each with its global bias where the mode says so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        moe = config.decoder.moe
        self.routed = RoutedExperts(config)
        self.shared = SharedExperts(config.dim, moe) if moe.shared_experts else None
        self.global_bias = nn.Parameter(torch.zeros(config.dim)) if moe.bias == "global" else None
        shared_global = moe.shared_experts and moe.shared_bias == "global"
        self.shared_bias = nn.Parameter(torch.zeros(config.dim)) if shared_global else None

    def forward(
        self, x_BTD: Tensor, valid_N: Tensor | None = None, load_E: Tensor | None = None
    ) -> tuple[Tensor, RoutingTerms | None]:
        """[B, T, D] -> ([B, T, D], routing terms where valid tokens and loads are given)."""
        out_BTD, routing = self.routed(x_BTD)
        for bias_D in (self.global_bias, self.shared_bias):
            if bias_D is not None:
                out_BTD = out_BTD + bias_D
        if self.shared is not None:
            out_BTD = out_BTD + self.shared(x_BTD)
        if valid_N is None or load_E is None:
            return out_BTD, None
        return out_BTD, routing_terms(routing, valid_N, load_E)


def routing_terms(routing: Routing, valid_N: Tensor, load_E: Tensor) -> RoutingTerms:
    """Balance sum, z sum and expert counts of one layer, over the valid tokens.

    Switch loss: Fedus et al. 2021 (arXiv 2101.03961); z-loss: Zoph et al. 2022 (arXiv 2202.08906). They are sums over
    tokens, which add up over ranks and micro-batches as means would not. megatron-core has both as functions, which the
    tests hold these against; importing them would take every rank of every start some two seconds.
    """
    return RoutingTerms(*_terms(routing.logits_NE, routing.probs_NE, routing.selected_NK, valid_N, load_E))


def _term_formulas(
    logits_NE: Tensor, probs_NE: Tensor, selected_NK: Tensor, valid_N: Tensor, load_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    experts, valid_N1 = load_E.numel(), valid_N.unsqueeze(1)
    balance = experts * ((probs_NE * valid_N1).sum(0) * load_E).sum()
    z = (logits_NE.logsumexp(-1).square() * valid_N).sum()
    # Padding is counted in an extra bin, so that no shape depends on the data.
    binned_NK = torch.where(valid_N1, selected_NK, experts)
    return balance, z, count_experts(binned_NK, experts + 1)[:experts]


_terms = Chain(_term_formulas)
