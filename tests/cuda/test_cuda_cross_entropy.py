"""Chunked cross-entropy on the device against torch's own in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from measures import FLOAT32, assert_near, tolerance
from torch import Tensor

from rxt_dist.model.cross_entropy import IGNORE, linear_cross_entropy

TOKENS, WIDTH, WORDS = 301, 64, 1000


def inputs() -> list[Tensor]:
    """hidden, weight and bias as bfloat16 holds them, and targets of which some do not count."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,))
    made = [torch.randn(shape, generator=generator).bfloat16().float() for shape in shapes]
    targets_N = torch.randint(0, WORDS, (TOKENS,), generator=generator)
    targets_N[::7] = IGNORE
    return [*made, targets_N]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("chunk", [64, 100, 4096], ids=str)
def test_loss_hits_and_gradients(chunk: int, dtype: torch.dtype, device: torch.device) -> None:
    *leaves, targets_N = inputs()
    leaves = [x.requires_grad_() for x in leaves]
    logits_NV = F.linear(leaves[0], leaves[1], leaves[2])
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
    expected = torch.autograd.grad(loss * 0.5, leaves)

    there = [x.detach().to(device, dtype).requires_grad_() for x in leaves]
    sums = linear_cross_entropy(there[0], there[1], there[2], targets_N.to(device), chunk)
    actual = torch.autograd.grad(sums.loss * 0.5, there)
    names = ("hidden", "weight", "bias")
    assert_near(names, actual, expected, 2 * tolerance(dtype))
    assert_near(("loss",), (sums.loss,), (loss,), FLOAT32 if dtype == torch.float32 else 1e-3)
    assert int(sums.targets) == int((targets_N != IGNORE).sum())
    hits = int(((logits_NV.argmax(-1) == targets_N) & (targets_N != IGNORE)).sum())
    assert int(sums.correct) == hits if dtype == torch.float32 else abs(int(sums.correct) - hits) <= 2
