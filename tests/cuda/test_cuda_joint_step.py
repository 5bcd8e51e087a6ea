"""The whole joint step on the device against the float32 CPU: losses, counts, every gradient, and steps in a row."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from measures import (
    BFLOAT16_ALL_GRADIENTS,
    BFLOAT16_LOSS,
    BFLOAT16_ONE_GRADIENT,
    BFLOAT16_SAME_EXPERTS,
    assert_near,
    distance,
)
from steps import engine_on, prepared, same_noise, train  # noqa: F401  (a fixture)
from tiny import ROWS, TOKENS, model_config, packed_batch
from torch import Tensor

from rxt_dist.losses import StageOutput, objective
from rxt_dist.model.moe import RoutedExperts
from rxt_dist.stages.base import Stage

pytestmark = pytest.mark.usefixtures("same_noise")

# Forward and backward of the whole network in float32.
STEP = 1e-4
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "one-token documents": {"lengths": ((1,) * TOKENS, (1, 30, 1), (31, 1), (2,) * 16) * 2},
    "padding": {"lengths": ((1,), (2, 3), (TOKENS,), (5,)) * 2},
    "two experts take all": {"one_place": True},
    "local biases": {"model": ("decoder.moe.bias=local", "decoder.moe.shared_bias=local")},
    "recomputed": {"recompute": True},
    "recomputed, local biases": {"recompute": True, "model": ("decoder.moe.bias=local",)},
}


def stage_of(case: dict[str, Any]) -> Stage:
    stage, _ = prepared(model=model_config(*case.get("model", ())), recompute=case.get("recompute", False))
    if case.get("one_place"):  # All others get no token.
        for block in stage.modules():
            if isinstance(block, RoutedExperts):
                block.expert_bias = torch.zeros(block.num_experts)
                block.expert_bias[-2:] = 100.0
    return stage.train()


def forward_and_backward(
    stage: Stage, case: dict[str, Any], device: torch.device
) -> tuple[StageOutput, dict[str, Tensor]]:
    """The output and the gradients of all parameters that have one."""
    micro = stage.prepare(packed_batch(0, **{name: case[name] for name in ("lengths",) if name in case}), 0)
    experts = stage.run.model.decoder.moe.experts
    load_ME = torch.linspace(0.5, 1.5, 3 * experts).view(3, experts) / experts
    counts_J = stage.counts(micro).float().to(device)
    output = stage(micro.to(device), load_ME.to(device))
    objective(output.sums_J, counts_J, stage.weights().to(device)).backward()
    named = stage.model.named_parameters()
    return output, {name: parameter.grad for name, parameter in named if parameter.grad is not None}


def on_device(stage: Stage, device: torch.device, dtype: torch.dtype) -> Stage:
    moved = copy.deepcopy(stage).to(device, dtype)
    for block in moved.modules():
        if isinstance(block, RoutedExperts) and block.expert_bias is not None:
            block.expert_bias = block.expert_bias.to(device)
    return moved


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, device: torch.device) -> None:
    stage = stage_of(CASES[name])
    expected, theirs = forward_and_backward(stage, CASES[name], torch.device("cpu"))
    actual, mine = forward_and_backward(on_device(stage_of(CASES[name]), device, torch.float32), CASES[name], device)
    assert_near(("sums",), (actual.sums_J,), (expected.sums_J,), STEP)
    assert torch.equal(actual.hits_J.cpu(), expected.hits_J)
    assert torch.equal(actual.expert_counts_ME.cpu(), expected.expert_counts_ME)
    assert mine.keys() == theirs.keys()
    assert_near(theirs, mine.values(), theirs.values(), STEP, zero_below=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_bfloat16(name: str, device: torch.device) -> None:
    case = CASES[name]
    expected, theirs = forward_and_backward(stage_of(case), case, torch.device("cpu"))
    actual, mine = forward_and_backward(on_device(stage_of(case), device, torch.bfloat16), case, device)
    assert actual.sums_J.tolist() == pytest.approx(expected.sums_J.tolist(), rel=BFLOAT16_LOSS)
    assert actual.expert_counts_ME.sum().item() == expected.expert_counts_ME.sum().item()
    one_gradient = BFLOAT16_ONE_GRADIENT
    if case.get("one_place"):
        assert torch.equal(actual.expert_counts_ME.cpu(), expected.expert_counts_ME)
        one_gradient = BFLOAT16_SAME_EXPERTS
    assert_near(theirs, (mine[key] for key in theirs), theirs.values(), one_gradient)
    whole = [torch.cat([gradients[key].flatten().cpu().float() for key in theirs]) for gradients in (mine, theirs)]
    assert distance(*whole) <= BFLOAT16_ALL_GRADIENTS


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("precision", "allowed"), [("float32", 1e-3), ("bfloat16", 5e-2)])
def test_five_steps_of_the_plain_engine(
    precision: str, allowed: float, accumulation: int, device: torch.device
) -> None:
    with engine_on(torch.device("cpu"), engine="plain", zero=0) as (engine, stage):
        expected = train(engine, stage, range(5))
    with engine_on(device, engine="plain", zero=0, precision=precision) as (engine, stage):
        actual = train(engine, stage, range(5), accumulation)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=allowed)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=5 * allowed)
        assert mine.experts_ME.sum().item() == theirs.experts_ME.sum().item()


def test_noise_of_a_sample_does_not_depend_on_its_company(device: torch.device) -> None:
    """The device's own generators, keyed by sample: a row has the same noise alone and among others."""
    from rxt_dist.stages.joint import cheated_context

    encoded_LBTD = torch.randn(2, 3, TOKENS, 32, generator=torch.Generator().manual_seed(0)).to(device)
    together = cheated_context(encoded_LBTD, (4, 5, ROWS), 0, 0.5, 0.3)
    alone = cheated_context(encoded_LBTD[:, 1:2], (5,), 0, 0.5, 0.3)
    assert torch.equal(together[:, 1:2], alone)
    assert not torch.equal(together[:, 0], together[:, 1])
