"""How far a run is: a live line on a terminal, a plain line now and then in a log file. Both go to stderr.

A terminal can go away (a lost ssh); what is said to a person is never a reason to stop.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as RichProgress

from rxt_dist.files import forget_terminal

_PLAIN_SECONDS = 30.0


class _Console(Console):
    """A console that leaves it to its user what a closed pipe means; rich's own would end the process."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Progress:
    """Progress of training in tokens; a context manager.

    Args:
        total_tokens: the budget of the run.
        enabled: whether this process speaks at all (rank 0 does).
    """

    def __init__(self, total_tokens: int, enabled: bool) -> None:
        self._total = total_tokens
        self._enabled = enabled
        self._console = _Console(file=sys.stderr)
        self._live = (
            RichProgress(
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.description}", markup=False),
                console=self._console,
            )
            if enabled and self._console.is_terminal
            else None
        )
        self._task = self._live.add_task("starting", total=total_tokens) if self._live else None
        self._first: tuple[float, int] | None = None
        self._printed_at = float("-inf")
        self._last_line = ""

    def __enter__(self) -> Self:
        if self._live:
            with self._terminal():
                self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            with self._terminal():
                self._live.stop()
        elif self._last_line and self._enabled:
            self._print(self._last_line)

    def update(self, tokens: int, fields: Mapping[str, str]) -> None:
        """Show the state after `tokens` trained tokens of the run, earlier lives included.

        Args:
            fields: what else to show, in this order, for example {"step": "120", "loss": "3.21", "accuracy": "41 %"}.
        """
        if not self._enabled:
            return
        now = time.monotonic()
        self._first = self._first or (now, tokens)
        line = "  ".join([*(f"{name} {value}" for name, value in fields.items()), self._pace(now, tokens)])
        if self._live and self._task is not None:
            with self._terminal():
                self._live.update(self._task, completed=tokens, description=line)
            return
        line = f"{tokens / self._total:6.1%}  {line}"
        if now - self._printed_at >= _PLAIN_SECONDS:
            self._print(line)
            self._printed_at, line = now, ""
        # Kept so that the state in which a run ends is shown although its turn had not come.
        self._last_line = line

    def message(self, text: str) -> None:
        """Print a line of its own, above the live line on a terminal, after the state that it belongs to."""
        if not self._enabled:
            return
        if self._last_line and not self._live:
            self._print(self._last_line)
            self._last_line = ""
        self._print(text)

    def _print(self, line: str) -> None:
        with self._terminal():
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """For writing to it: once it is gone, this process writes to nobody."""
        try:
            yield
        except OSError:
            self._enabled, self._live = False, None
            forget_terminal()

    def _pace(self, now: float, tokens: int) -> str:
        """Tokens, and once there are two points in this life: tokens/s since its first update, and the time left."""
        text = f"{_short(tokens)} of {_short(self._total)} tokens"
        if self._first is None or now <= self._first[0] or tokens <= self._first[1]:
            return text
        speed = (tokens - self._first[1]) / (now - self._first[0])
        return f"{text}  {_short(speed)} tokens/s  {_duration(max(0, self._total - tokens) / speed)} left"


def _short(number: float) -> str:
    """A number with its unit: 950, 12.3k, 4.56M, 78.9B."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{number:.0f}"


def _duration(seconds: float) -> str:
    """Two units: 3d 4h, 5h 06m, 7m 08s."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    return f"{hour}h {minute:02d}m" if hour else f"{minute}m {second:02d}s"
