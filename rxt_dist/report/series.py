"""The figures of runs on one axis, the tokens trained, thinned for drawing without losing an extreme."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rxt_dist.report.goodput import Goodput, superseded
from rxt_dist.report.records import Figures, RunFiles, number

# A picture is less than so many pixels wide, and each bucket keeps its least and its greatest value.
_BUCKETS = 600
# What is larger is drawn as a gap: no axis of it would be of use, and sums of it would not be finite.
_LARGEST = 1e100
_EVALUATION = "eval/"
_LAYER = re.compile(r"expert_load_max\[\d{1,4}\]")
_VIEWS = ("true", "zero", "foreign")
# Kinds of events that pictures mark.
MARKS = ("checkpoint", "restart", "rollback", "skipped")


@dataclass(frozen=True)
class Evaluated:
    """A figure of evaluations: `eval/SOURCE/VIEW/FIGURE`, or without a view where all views share it."""

    column: str
    source: str
    view: str
    figure: str


class RunSeries:
    """One run for drawing.

    Args:
        name: what tells it from the others.
        goodput: where its wall time went.
    """

    def __init__(self, files: RunFiles, name: str, goodput: Goodput) -> None:
        self.files, self.name, self.goodput = files, name, goodput
        self._training = _Axis(files.training)
        self._evaluations = _Axis(files.evaluations)

    def figure(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values) of a figure, of an evaluation where its name says so; nan is a gap."""
        axis = self._evaluations if column.startswith(_EVALUATION) else self._training
        return axis.of(column)

    def has(self, column: str) -> bool:
        """Whether any line has a number for it."""
        return bool(np.isfinite(self.figure(column)[1]).any())

    @cached_property
    def losses(self) -> list[str]:
        """Terms of the loss, in the order of the lines."""
        return [name for name in self.files.training.names if name.endswith("_loss") and self.has(name)]

    @cached_property
    def evaluated(self) -> list[Evaluated]:
        """All figures of evaluations."""
        return [found for name in self.files.evaluations.names if (found := _evaluated(name))]

    @cached_property
    def layers(self) -> list[str]:
        """Columns of the expert load, layer by layer."""
        found = {name: _LAYER.fullmatch(name) for name in self.files.training.names}
        return sorted((name for name, match in found.items() if match), key=lambda name: int(name.split("[")[1][:-1]))

    @cached_property
    def total_tokens(self) -> float:
        """The budget, where the configuration says it."""
        return number(self.files.settings.get("train.total_tokens"))

    @property
    def last_tokens(self) -> float:
        """Tokens of the last line; 0."""
        tokens = self._training.tokens
        return float(tokens[-1]) if len(tokens) else 0.0

    def hours(self) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, hours since the first launch) of the lines."""
        tokens, times = self._training.of("time")
        begun = self.goodput.lives[0].launched / 1000 if self.goodput.lives else 0.0
        known = np.isfinite(times)
        return tokens[known], (times[known] - begun) / 3600

    def tokens_at(self, steps: Sequence[float] | np.ndarray) -> np.ndarray:
        """Tokens trained after these steps, as the lines tell it."""
        known_steps, known_tokens = self._training.steps, self._training.tokens
        if not len(known_steps):
            return np.zeros(0)
        return np.interp(np.asarray(steps, float), np.r_[0.0, known_steps], np.r_[0.0, known_tokens])

    def marks(self, kind: str) -> np.ndarray:
        """Tokens at which something of MARKS happened."""
        steps = [number(event.get("step")) for event in self.files.events if _mark(event) == kind]
        return self.tokens_at([step for step in steps if np.isfinite(step)])

    def of_events(self, kind: str, field: str) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, values) of a field of all events of a kind."""
        pairs = [(number(event.get("step")), number(event.get(field))) for event in self._events(kind)]
        found = np.array([pair for pair in pairs if (np.abs(pair) < _LARGEST).all()], float).reshape(-1, 2)
        tokens = self.tokens_at(found[:, 0])
        return tokens, found[: len(tokens), 1]

    def _events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.files.events if event["kind"] == kind]


class _Axis:
    """The lines of one kind in the order of their tokens, without those whose work was done again."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures
        steps, tokens = np.array(figures.column("step")), np.array(figures.column("tokens"))
        self._kept = ~np.array(superseded(steps), bool) & (tokens >= 0) & (tokens < _LARGEST)
        self.steps, self.tokens = steps[self._kept], tokens[self._kept]

    def of(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        values = np.array(self._figures.column(column))[self._kept]
        return self.tokens, np.where(np.abs(values) < _LARGEST, values, np.nan)


def thinned(x: np.ndarray, y: np.ndarray, buckets: int = _BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """At most some 2 * `buckets` points, among them the least and the greatest value of each stretch of points.

    A stretch without any finite value stays one gap.
    """
    if len(x) <= 2 * buckets:
        return x, y
    bounds = np.linspace(0, len(x), buckets + 1).astype(int)[:-1]
    finite = np.isfinite(y)
    chosen: set[int] = {0, len(x) - 1}
    for begin, end in zip(bounds, [*bounds[1:], len(x)], strict=True):
        part, known = y[begin:end], finite[begin:end]
        if not known.any():
            chosen.add(int(begin))
            continue
        chosen.add(int(begin + np.argmin(np.where(known, part, np.inf))))
        chosen.add(int(begin + np.argmax(np.where(known, part, -np.inf))))
    at = np.array(sorted(chosen))
    return x[at], y[at]


def smoothed(y: np.ndarray, points: int) -> np.ndarray:
    """Centred mean over so many points, of those that are finite."""
    known = np.isfinite(y)
    sums, counts = (np.r_[0.0, np.cumsum(part)] for part in (np.where(known, y, 0.0), known))
    at = np.arange(len(y))
    low, high = np.maximum(0, at - points // 2), np.minimum(len(y), at + points // 2 + 1)
    number_of = counts[high] - counts[low]
    return np.where(number_of > 0, (sums[high] - sums[low]) / np.maximum(1, number_of), np.nan)


def _evaluated(column: str) -> Evaluated | None:
    parts = column.removeprefix(_EVALUATION).split("/")
    if not column.startswith(_EVALUATION) or len(parts) < 2:
        return None
    # A source may have a slash in its name: of more than three parts only a known view is one.
    has_view = len(parts) == 3 or (len(parts) > 3 and parts[-2] in _VIEWS)
    source = "/".join(parts[: -2 if has_view else -1])
    return Evaluated(column, source, parts[-2] if has_view else "", parts[-1])


def _mark(event: dict[str, Any]) -> str:
    kind = event["kind"]
    if kind == "resume":
        return "restart"
    return {"save": "checkpoint", "rollback": "rollback", "skip": "skipped"}.get(kind, "")
