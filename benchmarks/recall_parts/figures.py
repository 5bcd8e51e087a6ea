"""Results of all arms and seeds as JSON, tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recall_parts.arms import ARMS, DISTANCES, TRAINED, source
from rxt_dist.files import write_atomic, write_json_atomic
from rxt_dist.report.pictures import COLOURS, png_of

Result = dict[str, Any]
# Perplexity by turn is that of the longest dialogues that were trained on.
_TURNS_OF = source(TRAINED[-1])
_STATE_TURNS = (1, 8, 16)
# Of the first arm, what it says with another memory than its own.
_OTHERS = {"zero": "the same, memory zeroed", "foreign": "the same, foreign memory"}


def write_report(out: Path) -> str:
    """Write results.json, recall.md and recall.png from all results in the folder; returns the tables."""
    results = [json.loads(file.read_text()) for file in sorted(out.glob("results/*/*.json"))]
    results.sort(key=lambda result: (list(ARMS).index(result["arm"]), result["seed"]))
    write_json_atomic(out / "results.json", results)
    page = "\n".join(_page(results))
    write_atomic(out / "recall.md", page)
    write_atomic(out / "recall.png", _picture(results))
    return page


def lines(results: list[Result]) -> Iterator[tuple[str, list[Result], str]]:
    """Title, results of all seeds, and memory, of every line in table and picture."""
    for arm, of in ARMS.items():
        found = [result for result in results if result["arm"] == arm]
        if found:
            yield of.title, found, "true"
            if arm == next(iter(ARMS)):
                yield from ((title, found, memory) for memory, title in _OTHERS.items())


def recalls(results: Iterable[Result], memory: str) -> dict[int, list[float]]:
    """By distance the share of each seed: of questions for what was told just so many turns before, in the dialogues
    that were made for that distance."""
    found: dict[int, list[float]] = {}
    for result in results:
        for one in result["recall"]:
            if one["memory"] == memory and one["source"] == source(one["distance"]):
                found.setdefault(one["distance"], []).append(one["recalled"] / one["asked"])
    return dict(sorted(found.items()))


def perplexities(results: Iterable[Result], memory: str) -> dict[int, list[float]]:
    """By turn, from 1, the perplexity of each seed."""
    found: dict[int, list[float]] = {}
    for result in results:
        for one in result["turns"]:
            if one["memory"] == memory and one["source"] == _TURNS_OF:
                found.setdefault(one["turn"] + 1, []).append(one["perplexity"])
    return dict(sorted(found.items()))


def _page(results: list[Result]) -> Iterator[str]:
    held = [f"{distance}{'' if distance in TRAINED else ' (not trained)'}" for distance in DISTANCES]
    yield "Recall in %, by turns since the telling: mean over seeds (least to most)\n"
    yield from _table(["", *held], results, recalls, DISTANCES, lambda share: f"{100 * share:.0f}")
    turns = sorted({turn for _, of, memory in lines(results) for turn in perplexities(of, memory)})
    yield f"\nPerplexity of answers by turn, dialogues of {_TURNS_OF}\n"
    yield from _table(["", *map(str, turns)], results, perplexities, turns, lambda value: f"{value:.2f}", spread=False)
    yield "\nCost: steps and processor seconds of the arm's own run, of those before it, and bytes kept before a turn\n"
    yield _row(["", "seeds", "parameters", "steps", "s", "s before", *(f"turn {turn}" for turn in _STATE_TURNS)])
    yield _row(["---"] * (6 + len(_STATE_TURNS)))
    for title, of, memory in lines(results):
        if memory == "true":
            last, before = ([result["runs"] for result in of], [result["runs"][:-1] for result in of])
            yield _row([
                title, str(len(of)), f"{of[0]['parameters']:,}", f"{last[0][-1]['steps']:,}",
                f"{mean(runs[-1]['cpu_s'] for runs in last):.0f}",
                f"{mean(sum(run['cpu_s'] for run in runs) for runs in before):.0f}",
                *(f"{_bytes_kept(of[0], turn):,.0f}" for turn in _STATE_TURNS),
            ])  # fmt: skip


def _table(
    head: list[str],
    results: list[Result],
    figures: Callable[[Iterable[Result], str], dict[int, list[float]]],
    columns: Iterable[int],
    shown: Callable[[float], str],
    spread: bool = True,
) -> Iterator[str]:
    yield _row(head)
    yield _row(["---"] * len(head))
    for title, of, memory in lines(results):
        found = figures(of, memory)
        cells = []
        for column in columns:
            seeds = found.get(column, [])
            several = f" ({shown(min(seeds))}-{shown(max(seeds))})" if spread and len(seeds) > 1 else ""
            cells.append(shown(mean(seeds)) + several if seeds else "")
        yield _row([title, *cells])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bytes_kept(result: Result, turn: int) -> float:
    """Before a turn of the dialogues that are asked in last: the memory, or keys and values of the history."""
    state = result["state_bytes"]
    before = {
        one["turn"] + 1: one.get("before", 0) for one in result["turns"] if one["source"] == source(DISTANCES[-1])
    }
    return state["fixed"] + state["per_token"] * before.get(turn, 0)


def _picture(results: list[Result]) -> bytes:
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, results, recalls, 100.0)
    left.axvspan(TRAINED[-1] + 0.5, DISTANCES[-1] + 0.5, color="#eeeeee", zorder=0)
    left.set_xlabel("turns since the telling; grey: not trained")
    left.set_ylabel("recall, %")
    left.set_ylim(0, 102)
    left.set_xticks(DISTANCES)
    _draw(right, results, perplexities, 1.0)
    right.set_xlabel(f"turn, dialogues of {_TURNS_OF}")
    right.set_ylabel("perplexity of answers")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return png_of(figure)


def _draw(
    axes: Axes,
    results: list[Result],
    figures: Callable[[Iterable[Result], str], dict[int, list[float]]],
    factor: float,
) -> None:
    """Means over seeds, and what lies between the least and the most."""
    for (title, of, memory), colour in zip(lines(results), COLOURS, strict=False):
        found = {x: [factor * value for value in values] for x, values in figures(of, memory).items()}
        style = "-" if memory == "true" else "--"
        axes.plot(
            list(found), [mean(values) for values in found.values()], style, color=colour, label=title, marker="o",
            markersize=3,
        )  # fmt: skip
        axes.fill_between(
            list(found), [min(values) for values in found.values()], [max(values) for values in found.values()],
            color=colour, alpha=0.15, linewidth=0,
        )  # fmt: skip
