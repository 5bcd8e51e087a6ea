"""Routed experts on the device against the float32 CPU: grouped products in bfloat16, the loop in float32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measures import assert_near, tolerance
from place import DRY
from torch import Tensor

from rxt_dist.model.experts import Dispatch, ExpertStack, count_experts
from rxt_dist.model.moe import RouterGate, select_experts

# Tokens, width, hidden width, experts, choices. On a GPU also RxT-Beta's experts in narrow, and its widths; both at
# once would be minutes for the CPU that says what is right.
SMALL = (203, 64, 32, 8, 3)
ON_GPU = {"beta's experts": (1001, 128, 64, 384, 10), "beta's widths": (301, 512, 192, 16, 4)}
SHAPES = {"small": SMALL} | ({} if DRY else ON_GPU)


def stack(shape: tuple[int, ...], bias: str) -> ExpertStack:
    """Experts with random weights that bfloat16 holds exactly."""
    _, dim, hidden, experts, _ = shape
    moe: Any = SimpleNamespace(experts=experts, hidden=hidden, bias=bias)
    made = ExpertStack(dim, moe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_((torch.randn(parameter.shape, generator=generator) * 0.1).bfloat16())
    return made


def selection(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Chosen experts [N, K], each at most once a token; counts that are no multiple of 8, which kernels might want."""
    tokens, _, _, experts, choices = shape
    generator = torch.Generator().manual_seed(2)
    if kind == "one takes all":
        return torch.full((tokens, 1), experts - 2)
    usable = experts if kind == "spread" else experts // 2 + 1  # The others get no token.
    return torch.stack([torch.randperm(usable, generator=generator)[:choices] for _ in range(tokens)])


def run(experts: ExpertStack, selected_NK: Tensor, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and the gradients of the input, the routing weights and all parameters."""
    experts = experts.to(device, dtype)
    generator = torch.Generator().manual_seed(3)
    shape = (selected_NK.shape[0], experts.gate_up_proj.shape[2])
    x_ND = torch.randn(shape, generator=generator).bfloat16().to(device, dtype).requires_grad_()
    weights_NK = torch.rand(selected_NK.shape, generator=generator).bfloat16().float().to(device).requires_grad_()
    direction = torch.randn(shape, generator=generator).bfloat16().to(device, dtype)
    output = experts(x_ND, selected_NK.to(device), weights_NK)
    named = dict(experts.named_parameters())
    gradients = torch.autograd.grad(output, [x_ND, weights_NK, *named.values()], direction)
    return dict(zip(["output", "x", "weights", *named], [output, *gradients], strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("bias", ["global", "local"])
@pytest.mark.parametrize("kind", ["spread", "half idle", "one takes all"])
@pytest.mark.parametrize("size", SHAPES)
def test_experts(size: str, kind: str, bias: str, dtype: torch.dtype, device: torch.device) -> None:
    shape = SHAPES[size]
    selected_NK = selection(kind, shape)
    expected = run(stack(shape, bias), selected_NK, torch.device("cpu"), torch.float32)
    actual = run(stack(shape, bias), selected_NK, device, dtype)
    assert_near(expected, actual.values(), expected.values(), tolerance(dtype))
    idle = count_experts(selected_NK, shape[3]) == 0
    for name in ("gate_up_proj", "down_proj"):
        assert not actual[name].cpu()[idle].any(), f"{name}: an expert without a token has a gradient"


def test_choices_and_dispatch(device: torch.device) -> None:
    """The same experts for the same logits, ties aside; every choice at its place."""
    tokens, _, _, experts, choices = SMALL
    logits_NE = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(4))
    chosen = [select_experts(logits_NE.to(on), choices, None).selected_NK.cpu() for on in ("cpu", device)]
    assert torch.equal(chosen[0].sort(-1).values, chosen[1].sort(-1).values)
    there, here = (Dispatch.of(chosen[0].to(on), experts) for on in (device, "cpu"))
    for field in ("order_X", "inverse_X", "counts_E"):
        assert torch.equal(getattr(there, field).cpu(), getattr(here, field)), field


def test_the_router_is_float32_whatever_the_model_is(device: torch.device) -> None:
    """TF32 holds bfloat16 inputs exactly, so logits are as in float32; only their gradient is rounded."""
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(5)
    x_ND, weight_ED = (torch.randn(shape, generator=generator).bfloat16() for shape in ((203, 64), (8, 64)))
    gate = RouterGate(64, 8, bias=False).to(device, torch.bfloat16)
    with torch.no_grad():
        gate.weight.copy_(weight_ED)
    x = x_ND.to(device).requires_grad_()
    logits_NE = gate(x)
    assert logits_NE.dtype == torch.float32
    assert_near(("logits",), (logits_NE,), (x_ND.float() @ weight_ED.float().t(),), tolerance(torch.float32))
    direction = torch.randn(logits_NE.shape, generator=generator)
    gradients = torch.autograd.grad(logits_NE, [x, gate.weight], direction.to(device))
    expected = (direction @ weight_ED.float(), direction.t() @ x_ND.float())
    assert_near(("x", "weight"), gradients, expected, tolerance(torch.bfloat16))
