"""Which pictures a report has: for each its figures, its words, and the runs that have something to show in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rxt_dist.report.pictures import (
    MOST_HEAT_MAPS,
    MOST_PANELS,
    Line,
    Panel,
    draw_goodput,
    draw_heat_maps,
    draw_panels,
    draw_progress,
    draw_saves,
    shown_name,
)
from rxt_dist.report.series import Evaluated, RunSeries

_TERMS = {
    "ar": "next tokens (nats)",
    "mlm": "masked tokens (nats)",
    "balance": "balance (1 is even)",
    "z": "router z-loss",
    "rms": "rms of the memory",
    "thinking": "thinking (nats)",
    "answer": "answers (nats)",
    "call": "calls of tools (nats)",
    "eos": "ends of answers (nats)",
}


@dataclass(frozen=True)
class Picture:
    """A picture as PNG. text: what it shows, for people who read and for those who hear it. columns: its figures."""

    name: str
    title: str
    text: str
    png: bytes
    columns: tuple[str, ...] = ()
    wide: bool = False


# The names of all pictures that there can be.
NAMES = (
    "goodput",
    "loss",
    "accuracy",
    "evaluation-loss",
    "learning-rate",
    "gradient-norm",
    "throughput",
    "experts",
    "levels",
    "checkpoints",
    "progress",
)


def pictures_of(runs: Sequence[RunSeries]) -> Iterator[Picture]:
    """Every picture for which any run has a figure; each run in the same ones."""
    if any(run.goodput.wall_s for run in runs):
        text = "Where the wall time went: a bar for each run, a part for each use of the time."
        yield Picture("goodput", "Goodput", text, draw_goodput(runs), wide=True)
    yield from _losses(runs)
    yield from _evaluations(runs, "accuracy", "Accuracy on held-out rows", "by source and memory", "accuracy")
    yield from _single(runs, "learning-rate", "Learning rate", Panel("learning rate", (Line("lr"),)))
    norm = Panel("norm before clipping", (Line("grad_norm"),), smooth=True)
    yield from _single(runs, "gradient-norm", "Gradient norm", norm)
    yield from _single(
        runs,
        "throughput",
        "Speed",
        Panel("tokens / s", (Line("tokens_per_s"),), smooth=True),
        Panel("MFU", (Line("mfu"),), smooth=True, share=True),
        Panel("s / step", (Line("step_s"),), smooth=True),
    )
    yield from _experts(runs)
    levels = Panel("level", (Line("noise", "noise"), Line("masking", "masking")))
    yield from _single(runs, "levels", "Memory noise and masking", levels)
    yield from _evaluations(runs, "evaluation-loss", "Loss on held-out rows", "by source and memory", "loss")
    if any(len(run.of_events("save", "seconds")[0]) for run in runs):
        text = "Seconds until each checkpoint was committed, and seconds for which the training waited for it."
        yield Picture("checkpoints", "Checkpoints", text, draw_saves(runs))
    if any(len(run.hours()[0]) for run in runs):
        text = "Tokens trained over the wall time since the first launch."
        yield Picture("progress", "Progress", text, draw_progress(runs))


def _single(runs: Sequence[RunSeries], name: str, title: str, *panels: Panel) -> Iterator[Picture]:
    """A picture of fixed figures, of those panels for which any run has one."""
    there = [panel for panel in panels if any(run.has(line.column) for run in runs for line in panel.lines)]
    if there:
        columns = tuple(line.column for panel in there for line in panel.lines)
        labels = ", ".join(panel.label for panel in there)
        text = f"{labels[:1].upper()}{labels[1:]}, over tokens trained."
        yield Picture(name, title, text, draw_panels(runs, there), columns)


def _losses(runs: Sequence[RunSeries]) -> Iterator[Picture]:
    names = list(dict.fromkeys(name for run in runs for name in run.losses))
    panels = [
        Panel(_TERMS.get(name.removesuffix("_loss"), shown_name(name, 22)), (Line(name),), smooth=True)
        for name in names
    ]
    yield from _single(runs, "loss", "Loss by term", *panels[:MOST_PANELS])


def _evaluations(runs: Sequence[RunSeries], name: str, title: str, by: str, kind: str) -> Iterator[Picture]:
    """A panel for each source and term, a line for each memory."""
    found: dict[tuple[str, str], dict[str, Evaluated]] = {}
    for run in runs:
        for one in run.evaluated:
            if one.figure.endswith(f"_{kind}") and run.has(one.column):
                found.setdefault((one.source, one.figure), {})[one.view] = one
    if not found:
        return
    ordered = sorted(found, key=lambda key: list(dict.fromkeys(figure for _, figure in found)).index(key[1]))
    panels = [
        Panel(
            "accuracy" if kind == "accuracy" else "nats",
            tuple(
                Line(one.column, f"{shown_name(view, 16)} memory" if view else "") for view, one in found[key].items()
            ),
            share=kind == "accuracy",
            title=f"{shown_name(key[0], 20)}: {shown_name(key[1].removesuffix(f'_{kind}'), 20)}",
        )
        for key in ordered
    ]
    more = f" {len(panels) - MOST_PANELS} more are in the table." if len(panels) > MOST_PANELS else ""
    png = draw_panels(runs, panels[:MOST_PANELS], columns=1 if len(panels) == 1 else 2)
    columns = tuple(line.column for panel in panels for line in panel.lines)
    yield Picture(name, title, f"{title}, {by}, over tokens trained.{more}", png, columns)


def _memory(view: str) -> str:
    return f"{shown_name(view, 16)} memory" if view else ""


def _experts(runs: Sequence[RunSeries]) -> Iterator[Picture]:
    routed = [run for run in runs if run.layers and any(run.has(layer) for layer in run.layers)]
    if not routed:
        return
    text = "Load of the fullest expert over the mean of its layer, a row for each layer, over tokens trained."
    if len(routed) > MOST_HEAT_MAPS:
        text += f" The first {MOST_HEAT_MAPS} of {len(routed)} runs."
    columns = tuple(dict.fromkeys(layer for run in routed for layer in run.layers))
    yield Picture("experts", "Expert load", text, draw_heat_maps(routed), (*columns, "experts_idle"))
