"""Medians over alternating rounds, and the lines of a markdown table."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Line(NamedTuple):
    """One figure beside its goal: `ours` over `theirs`, or `ours` alone where there is no peer."""

    figure: str
    ours: str
    theirs: str
    ratio: str
    goal: str


def alternate(sides: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run every side once a round, in turn. Each side's medians, field by field."""
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            taken[name].append(run())
    return {
        name: {field: statistics.median(run[field] for run in runs) for field in runs[0]}
        for name, runs in taken.items()
    }


def best(results: Mapping[str, Mapping[str, Any]], names: Sequence[str], field: str) -> tuple[str, float]:
    """The name with the largest value, and the value."""
    name = max(names, key=lambda candidate: results[candidate][field])
    return name, results[name][field]


def ratio_line(
    figure: str, results: Mapping[str, Mapping[str, Any]], ours: str, peers: Sequence[str], field: str, goal: str
) -> Line:
    """Ours against the best of some peers; larger is better, values in Mtok per CPU second."""
    name, theirs = best(results, peers, field)
    value = results[ours][field]
    return Line(figure, f"{value:,.1f}", f"{theirs:,.2f} ({name})", f"{value / theirs:.1f}", goal)


def table(lines: Sequence[Line]) -> str:
    """A markdown table."""
    head = ["| figure | ours | peer | ratio | goal |", "|---|---|---|---|---|"]
    return "\n".join([*head, *(f"| {' | '.join(line)} |" for line in lines)])
