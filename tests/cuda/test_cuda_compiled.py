"""What torch.compile makes of a joint step on the device, against the same step uncompiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from measures import BFLOAT16_ALL_GRADIENTS, BFLOAT16_LOSS, assert_near, distance
from place import DRY
from steps import same_noise  # noqa: F401  (a fixture)
from test_cuda_joint_step import CASES, forward_and_backward, on_device, stage_of

from rxt_dist.model.fused import compile_chains

pytestmark = pytest.mark.usefixtures("same_noise")

STEP = 1e-5
# Tracing takes the CPU seconds each.
NAMES = ("recomputed",) if DRY else ("packed", "padding", "local biases", "recomputed")


@pytest.fixture
def backend(device: torch.device) -> Iterator[str]:
    """inductor; on the CPU, where that takes minutes, a trace run as it is (more: tests/model/test_fused.py)."""
    yield "inductor" if device.type == "cuda" else "eager"
    compile_chains(None)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", NAMES)
def test_float32(name: str, device: torch.device, backend: str) -> None:
    stage = on_device(stage_of(CASES[name]), device, torch.float32)
    expected, theirs = forward_and_backward(stage, CASES[name], device)
    theirs = {name: gradient.clone() for name, gradient in theirs.items()}
    stage.zero_grad()
    compile_chains(backend)
    actual, mine = forward_and_backward(stage, CASES[name], device)
    assert_near(("sums",), (actual.sums_J,), (expected.sums_J,), STEP)
    assert torch.equal(actual.expert_counts_ME, expected.expert_counts_ME)
    assert_near(theirs, (mine[key] for key in theirs), theirs.values(), 10 * STEP, zero_below=1e-3)


def test_bfloat16(device: torch.device, backend: str) -> None:
    stage = on_device(stage_of(CASES["packed"]), device, torch.bfloat16)
    expected, theirs = forward_and_backward(stage, CASES["packed"], device)
    theirs = {name: gradient.float().clone() for name, gradient in theirs.items()}
    stage.zero_grad()
    compile_chains(backend)
    actual, mine = forward_and_backward(stage, CASES["packed"], device)
    assert_near(("sums",), (actual.sums_J[:2],), (expected.sums_J[:2],), BFLOAT16_LOSS)
    flat = [torch.cat([gradients[name].float().flatten() for name in theirs]) for gradients in (mine, theirs)]
    assert distance(*flat) < BFLOAT16_ALL_GRADIENTS
