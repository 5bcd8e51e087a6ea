"""Routed experts against a loop over tokens, in float64 where the hand-written backward must be exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_dist.model.experts import Dispatch, ExpertStack, count_experts

# Widths that torch's grouped product accepts: rows of a multiple of 16 bytes.
TOKENS, DIM, HIDDEN, EXPERTS, CHOICES = 23, 12, 8, 5, 3


def stack(bias: str, dtype: torch.dtype) -> ExpertStack:
    """Experts with random weights and, where they have them, random biases."""
    moe: Any = SimpleNamespace(experts=EXPERTS, hidden=HIDDEN, bias=bias)
    experts = ExpertStack(DIM, moe).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return experts


def selection(kind: str) -> Tensor:
    """Chosen experts [N, K]: spread, two experts idle, or (with K = 1) all tokens at one expert."""
    generator = torch.Generator().manual_seed(2)
    if kind == "one takes all":
        return torch.full((TOKENS, 1), 3)
    usable = torch.tensor([0, 1, 2, 3, 4] if kind == "spread" else [0, 2, 4])
    return torch.stack([usable[torch.randperm(len(usable), generator=generator)[:CHOICES]] for _ in range(TOKENS)])


def naive(experts: ExpertStack, x_ND: Tensor, selected_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """sum_k a_k FF_k(x), one token and one choice at a time."""
    rows = []
    for token, x_D in enumerate(x_ND):
        total = torch.zeros_like(x_D)
        for expert, weight in zip(selected_NK[token].tolist(), weights_NK[token], strict=True):
            hidden = experts.gate_up_proj[expert] @ x_D
            if experts.gate_up_bias is not None:
                hidden = hidden + experts.gate_up_bias[expert]
            gate, up = hidden.chunk(2)
            output = experts.down_proj[expert] @ (F.silu(gate) * up)
            if experts.down_bias is not None:
                output = output + experts.down_bias[expert]
            total = total + weight * output
        rows.append(total)
    return torch.stack(rows)


def run(function: Any, experts: ExpertStack, selected_NK: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The output and the gradients of the input, the routing weights and all parameters."""
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(TOKENS, DIM, generator=generator).to(dtype).requires_grad_()
    weights_NK = torch.rand(selected_NK.shape, generator=generator)
    weights_NK = weights_NK.to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    direction = torch.randn(TOKENS, DIM, generator=generator).to(dtype)
    output = function(x_ND, selected_NK, weights_NK)
    gradients = torch.autograd.grad(output, [x_ND, weights_NK, *experts.parameters()], direction, allow_unused=True)
    return [output, *(torch.zeros(1) if gradient is None else gradient for gradient in gradients)]


@pytest.mark.parametrize("bias", ["off", "global", "local"])
@pytest.mark.parametrize("kind", ["spread", "two idle", "one takes all"])
def test_forward_and_backward_are_those_of_a_loop_over_tokens(bias: str, kind: str) -> None:
    experts, selected_NK = stack(bias, torch.float64), selection(kind)
    expected = run(lambda *a: naive(experts, *a), experts, selected_NK, torch.float64)
    # The gradient of a routing weight is accumulated in float32 by design.
    tolerances = [1e-12, 1e-12, 1e-6, *[1e-12] * len(list(experts.parameters()))]
    actual = run(experts, experts, selected_NK, torch.float64)
    for mine, theirs, tolerance in zip(actual, expected, tolerances, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", ["off", "local"])
@pytest.mark.parametrize("kind", ["spread", "two idle", "one takes all"])
def test_padded_rows_of_bfloat16_add_nothing(bias: str, kind: str) -> None:
    half, whole, selected_NK = stack(bias, torch.bfloat16), stack(bias, torch.bfloat16).float(), selection(kind)
    expected = run(lambda *a: naive(whole, *a), whole, selected_NK, torch.float32)
    for mine, theirs in zip(run(half, half, selected_NK, torch.bfloat16), expected, strict=True):
        scale = theirs.abs().max().clamp_min(1e-3)
        assert ((mine.float() - theirs).abs().max() / scale).item() < 0.04


@pytest.mark.parametrize("bias", ["off", "local"])
@pytest.mark.parametrize("kind", ["spread", "two idle", "one takes all"])
def test_the_grouped_products_of_cuda_are_those_of_a_loop_over_tokens(bias: str, kind: str) -> None:
    """Called by hand, since on CPU they are not chosen; tokens must come back in their own order."""
    experts, selected_NK = stack(bias, torch.float32), selection(kind)
    expected = run(lambda *a: naive(experts, *a), experts, selected_NK, torch.float32)

    def grouped(x_ND: Tensor, selected_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return experts._grouped(x_ND, weights_NK, selected_NK, Dispatch.of(selected_NK, EXPERTS))

    for mine, theirs in zip(run(grouped, experts, selected_NK, torch.float32), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_idle_experts_get_zero_gradients_not_what_was_in_memory() -> None:
    experts = stack("local", torch.float32)
    run(experts, experts, selection("spread"), torch.float32)
    gradients = run(experts, experts, selection("one takes all"), torch.float32)[3:]
    for gradient in gradients:
        assert not gradient[[0, 1, 2, 4]].any()
        assert gradient[3].any()


def test_a_gradient_that_is_one_number_repeated_is_accepted() -> None:
    experts = stack("off", torch.float32)
    x_ND = torch.randn(TOKENS, DIM, requires_grad=True)
    experts(x_ND, selection("spread"), torch.ones(TOKENS, CHOICES)).sum().backward()
    assert x_ND.grad is not None


def test_the_dispatch_sorts_by_expert_and_keeps_the_order_of_tokens() -> None:
    dispatch = Dispatch.of(torch.tensor([[2, 0], [0, 1], [2, 1]]), 4)
    assert dispatch.counts_E.tolist() == [2, 2, 2, 0]
    assert dispatch.tokens.tolist() == [0, 1, 1, 2, 0, 2]
    assert dispatch.order_X[dispatch.inverse_X].tolist() == list(range(6))


def test_counts_are_a_histogram() -> None:
    selected = torch.randint(0, 7, (50, 3))
    assert torch.equal(count_experts(selected, 9), torch.bincount(selected.flatten(), minlength=9))
