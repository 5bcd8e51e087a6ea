from __future__ import annotations

import pytest
import torch

from rxt_dist.losses import load_fractions, mean_over_layers, objective
from rxt_dist.model.moe import RoutingTerms


def test_the_objective_is_the_weighted_sum_of_means() -> None:
    sums = torch.tensor([6.0, 10.0, 3.0], requires_grad=True)
    total = objective(sums, torch.tensor([2.0, 5.0, 3.0]), torch.tensor([1.0, 0.5, 0.01]))
    total.backward()
    assert total.item() == pytest.approx(3.0 + 1.0 + 0.01)
    assert sums.grad is not None
    assert sums.grad.tolist() == pytest.approx([1 / 2, 0.5 / 5, 0.01 / 3])


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    """The counts are those of the global batch, so the objectives (and gradients) of its parts just add up."""
    parts = torch.rand(4, 3, dtype=torch.float64)
    counts, weights = torch.tensor([7.0, 11.0, 13.0]).double(), torch.tensor([1.0, 0.3, 0.1]).double()
    total = sum(objective(part, counts, weights) for part in parts)
    assert total == pytest.approx(objective(parts.sum(0), counts, weights).item())


def test_a_term_that_counts_nothing_is_zero() -> None:
    sums = torch.tensor([4.0, 0.0], requires_grad=True)
    total = objective(sums, torch.tensor([2.0, 0.0]), torch.ones(2))
    total.backward()
    assert total.item() == 2.0
    assert sums.grad is not None
    assert bool(torch.isfinite(sums.grad).all())


def test_routing_terms_are_averaged_over_layers() -> None:
    terms = RoutingTerms(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 5.0]), torch.zeros(2, 4, dtype=torch.int64))
    assert [value.item() for value in mean_over_layers(terms)] == [3.0, 3.0]


def test_load_fractions() -> None:
    fractions = load_fractions(torch.tensor([[0, 0, 0, 0], [1, 0, 3, 4], [0, 0, 0, 10**12]]))
    assert fractions.dtype == torch.float32
    assert fractions.tolist() == [[0.25] * 4, [0.125, 0.0, 0.375, 0.5], [0.0, 0.0, 0.0, 1.0]]
