"""A run that is watched while it is written: in a terminal and as plain lines, until it ends or somebody leaves."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from run_logs import Log, a_run, moment

from rxt_dist.errors import ConfigError
from rxt_dist.report import follow as module
from rxt_dist.report.follow import follow, sparkline


@pytest.fixture
def log(tmp_path: Path) -> Log:
    log = Log(tmp_path / "a-run")
    (log.path / "config.resolved.yaml").write_text("train: {total_tokens: 2048}\n")
    log.event(0, "start", life="a", launched="2026-03-01T12:00:00+00:00").event(1, "ready", step=0)
    return log.line(2, 1, tokens=512, ar_loss=3.25, grad_norm=1.5, steps=1, step_s=1.0)


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(module.time, "sleep", found.append)
    return found


def watched(log: Log, meanwhile: list[Callable[[], object]], terminal: bool) -> str:
    """What is shown when between looks these things happen, one after each."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None)
    looks = 0

    def clock() -> float:
        # Twice a look: before it, and for how long it took.
        nonlocal looks
        looks += 1
        if looks % 3 == 0:
            meanwhile.pop(0)()
        return moment(10)

    follow(log.path, 1.0, console, clock)
    assert not meanwhile
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def news(log: Log) -> list[Callable[[], object]]:
    return [
        lambda: log.line(3, 2, tokens=1024, ar_loss=2.5, steps=1, step_s=1.0),
        lambda: log.event(4, "save", step=2, path="[red]x\x1b[31m"),
        lambda: log.event(5, "exit", code=75, reason="SIGTERM", life="a"),
    ]


def test_plain_lines(log: Log, naps: list[float]) -> None:
    """Each event and each new figure once."""
    shown = watched(log, news(log), terminal=False)
    assert shown.count("ready step 0") == 1
    assert shown.count("step 1  512 of 2.05 k tokens  25.0%") == 1
    assert shown.count("step 2  1.02 k of 2.05 k tokens  50.0%") == 1
    assert shown.count("save step 2, path [red]x [31m") == 1
    assert "ar_loss 2.5" in shown
    assert shown.splitlines()[-1].startswith("75: SIGTERM; 5 s of wall time: productive steps 40.0%")
    assert "\x1b" not in shown
    assert naps == [1.0] * 3


@pytest.mark.parametrize("terminal", [False, True])
def test_what_a_file_says_is_no_command_of_a_terminal(log: Log, terminal: bool) -> None:
    """Nor ends it the watching: half a character, as a name that is no UTF-8 is written, cannot be shown."""
    enemy = "\x1b]0;owned\x07\udcff"
    log.line(3, 2, tokens=1024, steps=1, step_s=1.0, **{f"{enemy}_loss": 2.5})
    log.event(4, "save", step=2, path=enemy).event(5, "exit", code=1, reason=enemy, life="a")
    shown = watched(log, [], terminal)
    shown.encode()
    assert "owned" in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def test_a_terminal(log: Log) -> None:
    shown = watched(log, news(log), terminal=True)
    for text in ("a-run: running", "a-run: 75: SIGTERM", "ar_loss", "█", "productive steps", "grad_norm 1.5", "save"):
        assert text in shown, text


def test_a_finished_run_is_shown_once(tmp_path: Path, naps: list[float]) -> None:
    log = a_run(tmp_path / "a", lines=9)
    assert "a: finished" in watched(log, [], terminal=True)
    lines = watched(log, [], terminal=False).splitlines()
    assert len(lines) == 6 + 2, "the last events, the last figures, the end"
    assert naps == []


def leave() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("terminal", [False, True])
def test_somebody_leaves(log: Log, terminal: bool) -> None:
    assert watched(log, [leave], terminal)


def test_a_look_that_takes_long_is_taken_seldom(log: Log, naps: list[float]) -> None:
    times = iter([moment(0), moment(1), moment(2), moment(3), moment(4), leave])

    def clock() -> float:
        time = next(times)
        return time if isinstance(time, float) else leave() or 0.0

    follow(log.path, 1.0, Console(file=io.StringIO()), clock)
    assert naps == [40.0]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        follow(tmp_path)


def test_a_sparkline_goes_from_the_least_to_the_greatest() -> None:
    assert sparkline(np.array([0.0, math.nan, 7.0, 3.5]), 10) == "▁ █▅"
    assert sparkline(np.array([2.0, 2.0]), 10) == "▁▁"
    assert (sparkline(np.array([]), 10), sparkline(np.array([math.nan]), 10)) == ("", "")
    assert len(sparkline(np.arange(1000.0), 60)) == 60
