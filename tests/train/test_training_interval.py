"""The time of a log line: of training alone, also where a checkpoint continues the line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rxt_dist.errors import CheckpointError
from rxt_dist.stages.base import Term
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


def test_a_checkpoint_of_a_stage_that_had_fewer_terms_is_continued() -> None:
    def of(*names: str, state: Any = None) -> Interval:
        stage: Any = SimpleNamespace(terms=[Term(name, predicts=True) for name in names])
        return Interval(SimpleNamespace(), stage, 1, state)  # type: ignore[arg-type]

    state = of("ar", "z").state() | {"sums": [(6.0).hex(), (2.0).hex()], "counts": [(3.0).hex()] * 2, "hits": [1, 0]}
    again = of("ar", "z", "eos", state=state).state()
    assert again["sums"] == [(6.0).hex(), (2.0).hex(), (0.0).hex()]
    assert again["counts"] == [(3.0).hex(), (3.0).hex(), (0.0).hex()]
    assert again["hits"] == [1, 0, 0]
    # One of a later version is not cut short.
    with pytest.raises(CheckpointError, match="2 terms of the loss, but this version of the program has 1"):
        of("ar", state=state)


def test_an_error_ends_a_pause(clock: SimpleNamespace) -> None:
    interval = fresh()
    with pytest.raises(KeyError), interval.paused():
        raise KeyError
    clock.now += 1
    assert interval.seconds == 1
