"""The wall-clock limit: how early a run begins to stop, learnt from what steps and saves have taken."""

from __future__ import annotations

import time

import pytest

from rxt_dist.lives import Life
from rxt_dist.train import time_limit as module
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.time_limit import TimeLimit


class Clock:
    """A clock that goes on when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module.time, "time", lambda: self.now + 5e8)


def test_a_stop_begins_a_step_and_a_save_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    limit = TimeLimit("1h", time.time() + 3600)
    for seconds in (30.0, 100.0, 20.0):
        limit.hear({"kind": "save", "seconds": seconds})
    limit.hear({"kind": "eval", "seconds": 1000.0})
    limit.hear({"kind": "save"})
    assert not limit.is_near()
    clock.now += 15
    assert not limit.is_near()
    # Twice the longest save, the longest step, two seconds to end.
    assert limit.lead_seconds == 217
    tight = TimeLimit("1h", time.time() + 235)
    tight.hear({"kind": "save", "seconds": 100.0})
    assert not tight.is_near()
    clock.now += 15
    assert not tight.is_near(), "220 s are left, 217 are needed"
    clock.now += 4
    assert tight.is_near()
    clock.now -= 19
    assert tight.is_near(), "a stop that has begun is not taken back"


def test_before_the_first_save_a_share_of_the_limit_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    assert TimeLimit("10s", time.time() + 10).lead_seconds == 2
    assert TimeLimit("3h50m", time.time() + 10).lead_seconds == 62


def test_only_the_last_saves_count(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    limit = TimeLimit("1h", time.time() + 3600)
    for seconds in (1000.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        limit.hear({"kind": "save", "seconds": seconds})
    assert limit.lead_seconds == 4


def test_a_launchers_limit_counts_for_all_its_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    alone = TimeLimit.of("1h", Life("a", time.time() - 3590))
    assert alone.is_near()
    third = TimeLimit.of("1h", Life("c", launched=time.time(), attempt=2, deadline=time.time() + 100))
    assert not third.is_near()
    clock.now += 50
    assert third.is_near()


def test_it_is_a_reason_to_stop(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    over = TimeLimit("3h50m", time.time())
    assert StopRequest(tmp_path / "STOP", limit=over).reason == "time limit of 3h50m"
    assert StopRequest(tmp_path / "STOP", looks=False, limit=over).reason is None, "rank 0 looks at the clock for all"
