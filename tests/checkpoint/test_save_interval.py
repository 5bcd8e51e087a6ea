"""The interval between saves that loses the least time."""

from __future__ import annotations

import math

import pytest

from rxt_dist.checkpoint.interval import SaveCost, best_interval, lost_share, measured_cost

HOUR = 3600.0


def test_it_is_youngs_where_failures_are_rare_against_saves() -> None:
    assert best_interval(SaveCost(1.0, 5.0), 12 * HOUR) == pytest.approx(math.sqrt(2 * 12 * HOUR), rel=0.01)


@pytest.mark.parametrize(("stall", "hours"), [(0.5, 12), (30, 12), (60, 2), (5, 100)])
def test_no_other_interval_loses_less(stall: float, hours: float) -> None:
    cost, between = SaveCost(stall, 0.0), hours * HOUR
    best = best_interval(cost, between)
    # Daly's estimate is of a finer model than the sum of two losses, whose minimum is flat.
    for factor in (0.7, 1.5):
        assert lost_share(cost, between, best) < lost_share(cost, between, factor * best)


def test_it_is_no_shorter_than_a_save_takes() -> None:
    assert best_interval(SaveCost(0.0, 600.0), 12 * HOUR) == 600.0
    assert best_interval(SaveCost(100.0, 10.0), 40.0) == 40.0


def test_what_is_lost() -> None:
    """A second in every hundred, and of ten thousand half of a hundred and ten that were not committed."""
    assert lost_share(SaveCost(1.0, 10.0), 10_000.0, 100.0) == pytest.approx(0.01 + 0.006)


def test_costs_are_those_of_saves_that_training_did_not_wait_for() -> None:
    events = [
        {"kind": "save", "stall_s": 0.1, "seconds": 4.0},
        {"kind": "save", "stall_s": 0.3, "seconds": 6.0},
        {"kind": "save", "stall_s": 9.0, "seconds": 9.0},
        {"kind": "save", "seconds": 2.0},
        {"kind": "resume", "seconds": 1.0},
    ]
    assert measured_cost(events) == SaveCost(pytest.approx(0.2), 5.0)  # type: ignore[arg-type]
    assert measured_cost(events[2:]) is None
