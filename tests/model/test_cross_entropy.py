"""The chunked classifier against torch's cross-entropy over all logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_dist.model.cross_entropy import IGNORE, linear_cross_entropy

ROWS, DIM, WORDS = 21, 8, 37


def inputs(dtype: torch.dtype, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias, and targets of which every third is ignored."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_()
        for shape in ((rows, DIM), (WORDS, DIM), WORDS)
    )
    targets_N = torch.randint(0, WORDS, (rows,), generator=generator)
    targets_N[::3] = IGNORE
    return hidden, weight, bias, targets_N


def expected(hidden: Tensor, weight: Tensor, bias: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss in float64 and hits."""
    logits = F.linear(hidden.double(), weight.double(), bias.double())
    loss = F.cross_entropy(logits, targets_N, reduction="sum", ignore_index=IGNORE)
    return loss, ((logits.argmax(-1) == targets_N) & (targets_N != IGNORE)).sum()


@pytest.mark.parametrize("chunk", [1, 7, 8, ROWS - 1, ROWS, 1000])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_loss_hits_and_gradients_whatever_the_chunk(chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, targets_N = inputs(dtype)
    loss, hits = expected(hidden, weight, bias, targets_N)
    theirs = torch.autograd.grad(loss * 0.3, (hidden, weight, bias))
    sums = linear_cross_entropy(hidden, weight, bias, targets_N, chunk)
    mine = torch.autograd.grad(sums.loss * 0.3, (hidden, weight, bias))
    assert sums.loss.item() == pytest.approx(loss.item(), rel=tolerance)
    assert sums.targets.item() == (targets_N != IGNORE).sum().item()
    if dtype == torch.float32:
        assert sums.correct.item() == hits.item()
    for actual, wanted in zip(mine, theirs, strict=True):
        assert actual.dtype == dtype
        assert (actual.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max()


def test_more_rows_than_one_cpu_chunk() -> None:
    hidden, weight, bias, targets_N = inputs(torch.float32, rows=600)
    loss, hits = expected(hidden, weight, bias, targets_N)
    sums = linear_cross_entropy(hidden, weight, bias, targets_N, 2048)
    assert sums.loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert sums.correct.item() == hits.item()


def test_ignored_rows_have_no_gradient_and_all_ignored_is_zero() -> None:
    hidden, weight, bias, targets_N = inputs(torch.float32)
    linear_cross_entropy(hidden, weight, bias, targets_N, 8).loss.backward()
    assert hidden.grad is not None
    assert not hidden.grad[::3].any()
    nothing = linear_cross_entropy(hidden, weight, bias, torch.full_like(targets_N, IGNORE), 8)
    assert nothing.loss.item() == nothing.targets.item() == nothing.correct.item() == 0


def test_no_rows_at_all() -> None:
    hidden, weight, bias, targets_N = inputs(torch.float32)
    sums = linear_cross_entropy(hidden[:0], weight, bias, targets_N[:0], 8)
    sums.loss.backward()
    assert sums.loss.item() == 0
    assert weight.grad is not None
    assert not weight.grad.any()


def test_a_confident_mistake_keeps_its_whole_loss() -> None:
    """The probability of the target underflows; its logarithm must not."""
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [500.0]])
    assert linear_cross_entropy(hidden, weight, torch.zeros(2), torch.tensor([0]), 8).loss.item() == 500.0


def test_the_same_without_gradients() -> None:
    hidden, weight, bias, targets_N = inputs(torch.float32)
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, bias, targets_N, 8)
    assert quiet.loss.item() == linear_cross_entropy(hidden, weight, bias, targets_N, 8).loss.item()
