"""What a run reports: to its files, to the terminal, on rank 0 only. On other ranks everything here is silent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from rxt_dist.stages.base import Term
from rxt_dist.train.evaluate import Evaluation
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.progress import Progress


class _Where(Protocol):
    @property
    def step(self) -> int: ...

    @property
    def tokens_seen(self) -> int: ...


class Reporter:
    """Metrics, events and the progress line of one life of a run.

    Args:
        writer: None on all ranks but the first.
        terms: the terms of the stage.
    """

    def __init__(self, writer: MetricsWriter | None, progress: Progress, terms: Sequence[Term]) -> None:
        self._writer = writer
        self._progress = progress
        self._titled = [term for term in terms if term.title]
        # The others are left to metrics.jsonl.
        self._shown = [term for term in self._titled if not term.detail]

    def line(self, position: _Where, figures: Mapping[str, float | list[float]], tokens: int) -> None:
        """One log step."""
        if self._writer is None:
            return
        values = {"tokens": tokens, "tokens_seen": position.tokens_seen, **figures}
        self._writer.log(position.step, values)
        shown = {"step": str(position.step)}
        there = [term for term in self._shown if f"{term.name}_loss" in figures]
        shown |= {term.name: f"{figures[f'{term.name}_loss']:.3f}" for term in there}
        for term in [term for term in there if term.predicts][:1]:
            shown["accuracy"] = f"{100 * _number(figures[f'{term.name}_accuracy']):.1f}%"
        self._progress.update(tokens, shown)

    def event(self, kind: str, **fields: Any) -> None:
        """Something that happened once."""
        if self._writer is not None:
            self._writer.event(kind, **fields)
            self._progress.message(f"{kind}: " + ", ".join(f"{name} {value}" for name, value in fields.items()))

    def evaluation(self, step: int, tokens: int, results: Sequence[Evaluation], seconds: float) -> None:
        """An evaluation that took so many seconds: one metrics line, an event, and a table for a person."""
        if self._writer is None or not results:
            return
        values: dict[str, float] = {"tokens": tokens}
        for result in results:
            for term in self._titled:
                if term.name not in result.losses or (not term.by_view and result.view != results[0].view):
                    continue
                place = [result.source, *([result.view] if term.by_view and result.view else [])]
                prefix = "/".join(["eval", *place, term.name])
                values[f"{prefix}_loss"] = result.losses[term.name]
                if term.predicts:
                    values[f"{prefix}_accuracy"] = result.accuracies[term.name]
        self._writer.log(step, values)
        sources = len({result.source for result in results})
        self._writer.event("eval", step=step, sources=sources, seconds=round(seconds, 3))
        for text in evaluation_lines(results, self._shown):
            self._progress.message(text)

    def is_evaluated(self, step: int) -> bool:
        """Whether an evaluation of `step` has been written, by an earlier life perhaps."""
        return self._writer is not None and self._writer.has_evaluation(step)

    def go_back(self, step: int) -> dict[str, Any]:
        """Drop the lines of steps after `step`, which come again; what they held (see `MetricsWriter.lost_after`)."""
        if self._writer is None:
            return {}
        lost = self._writer.lost_after(step)
        self._writer.truncate_after(step)
        return lost

    def message(self, text: str) -> None:
        """A line for a person only."""
        self._progress.message(text)


# As many columns of figures as stand side by side in a terminal.
_MOST_COLUMNS = 5


def evaluation_lines(results: Sequence[Evaluation], terms: Sequence[Term]) -> list[str]:
    """A table of accuracy and loss: a row for each source, with a column for each term and, of some, each view. Where
    these are too many to be read side by side, a row for each source and view."""
    views = list(dict.fromkeys(result.view for result in results))
    columns = [(term, view) for term in terms for view in (views if term.by_view else views[:1])]
    table = Table(title="held-out rows: accuracy (loss)")
    if len(columns) > _MOST_COLUMNS:
        _add_by_view(table, results, terms, views[0])
    else:
        _add_by_source(table, results, columns, views)
    console = Console(width=110)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip().split("\n")


def _add_by_source(
    table: Table, results: Sequence[Evaluation], columns: Sequence[tuple[Term, str]], views: Sequence[str]
) -> None:
    for heading in ("source", "language", "rows", *(_heading(term, view, len(views)) for term, view in columns)):
        table.add_column(heading)
    for source in dict.fromkeys(result.source for result in results):
        found = {result.view: result for result in results if result.source == source}
        one = found[views[0]]
        table.add_row(source, one.language, str(one.rows), *(_cell(term, found[view]) for term, view in columns))


def _add_by_view(table: Table, results: Sequence[Evaluation], terms: Sequence[Term], first: str) -> None:
    for heading in ("source", "view", "rows", *(term.title for term in terms)):
        table.add_column(heading)
    for result in results:
        cells = [_cell(term, result) if term.by_view or result.view == first else "" for term in terms]
        table.add_row(result.source, result.view, str(result.rows), *cells)


def _cell(term: Term, result: Evaluation) -> str:
    if term.name not in result.losses:
        return "-"
    loss = f"{result.losses[term.name]:.3f}"
    return f"{100 * result.accuracies[term.name]:.1f}% ({loss})" if term.predicts else loss


def _heading(term: Term, view: str, views: int) -> str:
    return f"{term.title}: {view}" if term.by_view and views > 1 else term.title


def _number(value: float | list[float]) -> float:
    assert not isinstance(value, list)
    return value
