"""A run in a terminal while it trains: progress, last figures, goodput, last events. Plain lines where it is none."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rxt_dist.report.goodput import PARTS, measure
from rxt_dist.report.page import fields_of, time_left, tokens_text, when_of
from rxt_dist.report.pictures import short_time
from rxt_dist.report.records import RunFiles
from rxt_dist.report.series import RunSeries

_EVERY_S = 3.0
_EVENTS_SHOWN, _SPARKS = 6, 60
_BARS = "▁▂▃▄▅▆▇█"
_SHOWN = ("grad_norm", "lr", "tokens_per_s", "mfu", "step_s", "experts_idle")


def follow(
    path: Path, every_s: float = _EVERY_S, console: Console | None = None, clock: Callable[[], float] = time.time
) -> None:
    """Show a run until it ends, or until Ctrl-C.

    Raises:
        ConfigError: it is no folder of a run, or cannot be read.
        DiskError: its disk fails.
    """
    console = console or Console()
    files = RunFiles(path)
    try:
        if console.is_terminal:
            _live(files, every_s, console, clock)
        else:
            _plain(files, every_s, console, clock)
    except KeyboardInterrupt:
        return


def _live(files: RunFiles, every_s: float, console: Console, clock: Callable[[], float]) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            began = clock()
            run = _look(files, clock)
            live.update(view(run, console.width), refresh=True)
            if _is_over(run):
                return
            _wait(files, every_s, began, clock)


def _plain(files: RunFiles, every_s: float, console: Console, clock: Callable[[], float]) -> None:
    """A line for each new event and, where there is a new one, for the last line of figures."""
    told, step = max(0, len(files.events) - _EVENTS_SHOWN), math.nan
    while True:
        began = clock()
        run = _look(files, clock)
        for event in files.events[told:]:
            _print(console, _event_text(event))
        told = len(files.events)
        if files.training.last("step") != step and files.training.rows:
            step = files.training.last("step")
            _print(console, f"{_progress_text(run)}  {_losses_text(run)}")
        if _is_over(run):
            _print(console, f"{run.goodput.state}; {_goodput_text(run)}")
            return
        sys.stdout.flush()
        _wait(files, every_s, began, clock)
        told = min(told, len(files.events))


def _wait(files: RunFiles, every_s: float, began: float, clock: Callable[[], float]) -> None:
    """Until the next look, which takes at most a twentieth of the time: a login node is for everybody."""
    time.sleep(max(every_s, 20 * (clock() - began)))
    files.refresh()


def _look(files: RunFiles, clock: Callable[[], float]) -> RunSeries:
    return RunSeries(files, files.name, measure(files, clock()))


def _is_over(run: RunSeries) -> bool:
    return run.goodput.state not in ("running", "empty", "silent")


def view(run: RunSeries, width: int) -> RenderableType:
    """What the terminal shows of a run at one moment."""
    parts: list[RenderableType] = [Text(_shown(f"{run.name}: {run.goodput.state}"), style="bold", overflow="ellipsis")]
    if run.total_tokens > 0:
        bar = ProgressBar(run.total_tokens, run.last_tokens, width=min(60, width))
        parts += [bar]
    parts.append(Text(_progress_text(run)))
    losses = Table.grid(padding=(0, 2))
    for name in run.losses:
        spark = sparkline(run.figure(name)[1], min(_SPARKS, max(10, width - 30)))
        losses.add_row(Text(_shown(name)), _number(run.files.training.last(name)), spark)
    parts.append(losses)
    shown = [name for name in _SHOWN if run.has(name)]
    parts.append(Text("  ".join(f"{name} {_number(run.files.training.last(name))}" for name in shown)))
    parts.append(Text(_goodput_text(run)))
    parts += [
        Text(_shown(_event_text(event)), style="dim", overflow="ellipsis", no_wrap=True)
        for event in run.files.events[-_EVENTS_SHOWN:]
    ]
    return Group(*parts)


def sparkline(values: np.ndarray, width: int) -> str:
    """A line of blocks: of each stretch of the values the last, from the least to the greatest; a gap is a space."""
    y = np.asarray(values, float)
    if not len(y):
        return ""
    at = np.unique(np.linspace(0, len(y) - 1, min(width, len(y))).astype(int))
    y = y[at]
    finite = y[np.isfinite(y)]
    if not len(finite):
        return ""
    low, span = finite.min(), np.ptp(finite) or 1.0
    return "".join(_BARS[min(7, int(8 * (value - low) / span))] if math.isfinite(value) else " " for value in y)


def _progress_text(run: RunSeries) -> str:
    step = run.files.training.last("step")
    parts = [f"step {step:,.0f}" if math.isfinite(step) else "no step yet"]
    if run.total_tokens > 0:
        parts.append(f"{tokens_text(run.last_tokens)} of {tokens_text(run.total_tokens)} tokens")
        parts.append(f"{run.last_tokens / run.total_tokens:.1%}")
    left = time_left(run)
    if run.goodput.state == "running" and math.isfinite(left):
        parts.append(f"{short_time(left)} left at this pace")
    return "  ".join(parts)


def _losses_text(run: RunSeries) -> str:
    return "  ".join(f"{name} {_number(run.files.training.last(name))}" for name in run.losses)


def _goodput_text(run: RunSeries) -> str:
    shares = [f"{PARTS[part]} {share:.1%}" for part, share in run.goodput.share.items() if share >= 0.0005]
    return f"{short_time(run.goodput.wall_s)} of wall time: {', '.join(shares)}"


def _event_text(event: Mapping[str, Any]) -> str:
    return f"{when_of(event)} {event['kind']} {fields_of(event)}"


def _shown(text: str) -> str:
    """Without what commands a terminal or is no character: names and reasons are a file's, and that may hold any."""
    return "".join(character if character.isprintable() else " " for character in text)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _print(console: Console, line: str) -> None:
    console.print(_shown(line), markup=False, highlight=False, soft_wrap=True)
