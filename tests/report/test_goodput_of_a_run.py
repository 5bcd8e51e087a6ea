"""Goodput of a real run that died and went on."""

from __future__ import annotations

import time
from typing import Any

import pytest
from training_run import TinyRun, build_shards

from rxt_dist.config.load import load_run
from rxt_dist.errors import ExitCode
from rxt_dist.lives import Life
from rxt_dist.ranks import Ranks
from rxt_dist.report.goodput import goodput
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

STEPS, DEATH = 10, 8


class DeathError(Exception):
    """Ends a life after a line was written."""


@pytest.mark.slow
def test_a_real_run_that_died_and_went_on(tmp_path, monkeypatch):
    tiny = TinyRun(tmp_path, build_shards(tmp_path), steps=STEPS)
    line = Reporter.line

    def deadly(self: Reporter, position: Any, *arguments: Any) -> None:
        line(self, position, *arguments)
        if position.step == DEATH:
            raise DeathError

    def live(token: str) -> ExitCode:
        life = Life(token, time.time())
        return train(load_run(tiny.file, []), Ranks(0, 1, 0), StopRequest(tmp_path / "STOP"), life=life)

    began = time.time()
    with monkeypatch.context() as patched:
        patched.setattr(Reporter, "line", deadly)
        with pytest.raises(DeathError):
            live("a")
    assert live("b") == ExitCode.DONE
    took = time.time() - began
    found = goodput(tiny.directory, time.time())
    (resume,) = tiny.events("resume")
    assert resume["lost_steps"] == DEATH - resume["step"] > 0
    assert (found.state, [one.first_step for one in found.lives]) == ("finished", [0, resume["step"]])
    assert 0 < found.wall_s < took + 0.01
    for part in ("productive", "recomputed", "checkpoints", "evaluation"):
        assert found.seconds[part] > 0, part
    assert sum(life.steps for life in found.lives) == STEPS
    assert round(1000 * sum(found.seconds.values())) == round(1000 * found.wall_s)
