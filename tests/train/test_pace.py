"""What ranks say of their speed, and when one is told to be slow or short of data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rxt_dist.train import pace
from rxt_dist.train.pace import SLOW_LINES, Pace, product_seconds


class Others:
    """Ranks of which all but this one wait and compute as they are told."""

    world_size, rank, device = 3, 0, torch.device("cpu")

    def __init__(self) -> None:
        self.others = torch.tensor([[0, 0], [0.5, 1.0], [0.25, 1.0]], dtype=torch.float64)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        return values + self.others


def told(monkeypatch: pytest.MonkeyPatch, own: list[float]) -> list[list[tuple[int, float]]]:
    ranks: Any = Others()
    watched = Pace(ranks)
    results = []
    for seconds in own:
        monkeypatch.setattr(pace, "product_seconds", lambda _, seconds=seconds: seconds)
        results.append(watched.exchange(0.1).slow)
    return results


def test_a_rank_that_stays_slow_is_told_once(monkeypatch):
    lines = told(monkeypatch, [2.0] * (SLOW_LINES + 3))
    assert lines == [[]] * (SLOW_LINES - 1) + [[(0, 2.0)]] + [[]] * 3


def test_one_line_in_time_forgives(monkeypatch):
    assert not any(told(monkeypatch, ([2.0] * (SLOW_LINES - 1) + [1.2]) * 3))


def test_the_longest_wait_is_reported(monkeypatch):
    ranks: Any = Others()
    found = Pace(ranks).exchange(0.1)
    assert (found.waited, found.waiting) == (0.5, 1)
    assert not found.is_starved(1.0)
    ranks.others[1, 0] = 3.0
    starving = Pace(ranks).exchange(0.1)
    assert starving.is_starved(10.0)
    assert not starving.is_starved(20.0)


def test_a_product_takes_time():
    assert 0 < product_seconds(torch.device("cpu")) < 1
