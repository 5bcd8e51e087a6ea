"""The time of a log line: of training alone, also where a checkpoint continues the line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rxt_dist.train import interval as module
from rxt_dist.train.interval import Interval


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def fresh(state: Any = None) -> Interval:
    nothing: Any = SimpleNamespace(terms=())
    return Interval(nothing, nothing, 1, state)


def test_what_a_pause_takes_does_not_count_nor_in_a_checkpoint_that_is_made_in_it(clock: SimpleNamespace) -> None:
    interval = fresh()
    clock.now += 5
    with interval.paused():
        clock.now += 60
        state = interval.state()
        assert (state["seconds"], interval.seconds) == (5, 5)
        clock.now += 7
    clock.now += 2
    assert interval.seconds == 7
    clock.now += 1000
    resumed = fresh(state)
    clock.now += 3
    assert resumed.seconds == 8


def test_an_error_ends_a_pause(clock: SimpleNamespace) -> None:
    interval = fresh()
    with pytest.raises(KeyError), interval.paused():
        raise KeyError
    clock.now += 1
    assert interval.seconds == 1
