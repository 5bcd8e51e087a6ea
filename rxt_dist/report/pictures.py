"""Pictures of one run or several on one axis, the tokens trained; on each the checkpoints, restarts and rollbacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter

from rxt_dist.report.goodput import PARTS
from rxt_dist.report.series import RunSeries, smoothed, thinned

_DOTS_PER_INCH = 160
_WIDTH, _ROW, _AROUND = 6.4, 1.7, 1.1
# Told apart by people of any colour sight (Okabe and Ito).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6b6b6b", "#9a3412")
_STYLES = ("-", "--", ":", "-.")
_PART_COLOURS = dict(
    zip(PARTS, ("#009e73", "#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#cc79a7", "#4d4d4d", "#c9c9c9"), strict=True)
)
_SMOOTH_FROM, _SMOOTH_SHARE = 300, 60
_HEAT_COLUMNS = 300
MOST_PANELS, MOST_HEAT_MAPS = 12, 4
_LOG_FROM = 50.0
_LEGEND_WIDTH = 88
_MARK, _ALARM, _DASHES = "#444444", "#c00000", (0, (4, 3))


@dataclass(frozen=True)
class Line:
    """A figure and what the legend calls it besides its run."""

    column: str
    label: str = ""


@dataclass(frozen=True)
class Panel:
    """One set of axes: figures with a common unit. smooth: a mean is drawn over what is noisy."""

    label: str
    lines: tuple[Line, ...]
    logarithmic: bool = False
    smooth: bool = False
    share: bool = False
    title: str = ""


def png_of(figure: Figure) -> bytes:
    """A figure as a PNG file, without a display."""
    buffer = BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=_DOTS_PER_INCH)
    return buffer.getvalue()


def draw_panels(runs: Sequence[RunSeries], panels: Sequence[Panel], columns: int = 1) -> bytes:
    """Panels below each other (or in so many columns), all with the same axis of tokens."""
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(_WIDTH, _AROUND + _ROW * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(panels):
            axes.set_visible(False)
            continue
        _draw_panel(axes, runs, panels[index])
        if index + columns >= len(panels):
            axes.tick_params(labelbottom=True)
    _finish_axis(runs, grid)
    _legend(figure, runs, [axes for axes in grid.flat if axes.get_visible()])
    return png_of(figure)


def _draw_panel(axes: Axes, runs: Sequence[RunSeries], panel: Panel) -> None:
    least, most = math.inf, -math.inf
    for run_index, run in enumerate(runs):
        for line_index, line in enumerate(panel.lines):
            x, y = run.figure(line.column)
            finite = y[np.isfinite(y)]
            if not len(finite):
                continue
            least, most = min(least, finite.min()), max(most, finite.max())
            colour = COLOURS[(run_index if len(runs) > 1 else line_index) % len(COLOURS)]
            label = ", ".join(part for part in (shown_name(run.name) if len(runs) > 1 else "", line.label) if part)
            style = _STYLES[line_index % len(_STYLES)]
            _draw_line(axes, x, y, panel.smooth, color=colour, linestyle=style, label=label or None)
    if (panel.logarithmic and least > 0) or (panel.smooth and 0 < least < most / _LOG_FROM):
        axes.set_yscale("log")
    elif panel.share:
        axes.set_ylim(0, min(1.0, max(0.05, 1.1 * most)) if most <= 1 else None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    elif 10_000 <= most < 1e18:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(panel.label)
    if panel.title:
        axes.set_title(panel.title, fontsize="medium", loc="left")
    _mark(axes, runs)


def _draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, smooth: bool, **style: Any) -> None:
    # A single point, or one between gaps, has no line: it is a dot.
    few = len(x) < 40
    dots: dict[str, Any] = {"marker": "o", "markersize": 3} if few else {}
    if not smooth or len(x) < _SMOOTH_FROM:
        axes.plot(*thinned(x, y), linewidth=1.3, **dots, **style)
        return
    axes.plot(*thinned(x, y), linewidth=0.7, alpha=0.35, **{**style, "label": None})
    axes.plot(*thinned(x, smoothed(y, len(y) // _SMOOTH_SHARE)), linewidth=1.5, **style)


def _mark(axes: Axes, runs: Sequence[RunSeries]) -> None:
    """Checkpoints and skipped updates as ticks at the lower and upper edge, restarts and rollbacks as lines."""
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)] if len(runs) > 1 else _MARK
        edge = axes.get_xaxis_transform()
        for kind, height, marker, size, own in (
            ("checkpoint", 0.04, "|", 7, colour),
            ("skipped", 1.0, "v", 4, _ALARM),
        ):
            # A line without points would upset the layout.
            if len(marks := run.marks(kind)):
                heights = np.full(len(marks), height)
                axes.plot(
                    marks, heights, marker, color=own, markersize=size, transform=edge, clip_on=kind == "checkpoint"
                )
        for kind, style, own in (("restart", _DASHES, colour), ("rollback", "-", _ALARM)):
            for at in run.marks(kind):
                axes.axvline(at, color=own, linestyle=style, linewidth=0.9, alpha=0.6)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _finish_axis(runs: Sequence[RunSeries], grid: np.ndarray) -> None:
    """Tokens below, and of a single run the wall time above: of several each has its own."""
    end = max([run.last_tokens for run in runs], default=0.0)
    for axes in grid.flat:
        axes.set_xlim(0, 1.015 * end or 1.0)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.locator_params(axis="x", nbins=6)
    for axes in grid[-1]:
        axes.set_xlabel("tokens trained")
    if len(runs) == 1:
        tokens, hours = runs[0].hours()
        if len(tokens) > 1:
            for axes in grid[0]:
                _wall_time_axis(axes, np.r_[0.0, tokens], np.r_[0.0, hours], brief=grid.shape[1] > 1)


def _wall_time_axis(axes: Axes, tokens: np.ndarray, hours: np.ndarray, brief: bool) -> None:
    above = axes.twiny()
    above.set_xlim(axes.get_xlim())
    ticks = [tick for tick in axes.get_xticks() if tokens[0] <= tick <= tokens[-1]]
    above.xaxis.set_major_locator(FixedLocator(ticks))
    above.set_xticklabels([short_time(3600 * hour) for hour in np.interp(ticks, tokens, hours)])
    above.set_xlabel("wall time" if brief else "wall time since the first launch", fontsize="small")
    above.tick_params(length=2, labelsize="small")
    above.spines[["right"]].set_visible(False)


def _legend(figure: Figure, runs: Sequence[RunSeries], all_axes: Sequence[Axes]) -> None:
    """Each line once, and the marks that are there, below all."""
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    marks = {
        "checkpoint": Line2D([], [], color=_MARK, marker="|", linestyle="none", markersize=7),
        "restart": Line2D([], [], color=_MARK, linestyle=_DASHES, linewidth=0.9),
        "rollback": Line2D([], [], color=_ALARM, linewidth=0.9),
        "skipped": Line2D([], [], color=_ALARM, marker="v", linestyle="none", markersize=4),
    }
    for kind, handle in marks.items():
        if any(len(run.marks(kind)) for run in runs):
            entries[{"skipped": "skipped update"}.get(kind, kind)] = handle
    if entries:
        # What a legend's entry takes besides its text, and what fits beside each other, in characters.
        ncols = max(1, min(4, _LEGEND_WIDTH // (max(map(len, entries)) + 7)))
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=ncols,
            frameon=False,
            fontsize="small",
        )


def draw_heat_maps(runs: Sequence[RunSeries]) -> bytes:
    """Load of the fullest expert over the mean, a row a layer; of several runs each below the other, one scale."""
    shown = runs[:MOST_HEAT_MAPS]
    figure = Figure(figsize=(_WIDTH, _AROUND + 1.9 * len(shown)), layout="constrained")
    grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)
    loads = [_load(run) for run in shown]
    most = max(2.0, *(float(np.nanpercentile(load, 99)) for _, load in loads))
    image = None
    for axes, run, (edges, load) in zip(grid.flat, shown, loads, strict=True):
        rows = np.arange(load.shape[0] + 1) - 0.5
        image = axes.pcolormesh(edges, rows, load, vmin=1.0, vmax=most, cmap="viridis", rasterized=True)
        axes.set_ylabel("layer with experts")
        axes.yaxis.get_major_locator().set_params(integer=True)
        if len(runs) > 1:
            axes.set_title(shown_name(run.name), fontsize="medium", loc="left")
        _mark(axes, [run])
        axes.grid(False)
    _finish_axis(shown, grid)
    assert image is not None
    figure.colorbar(image, ax=list(grid.flat), label="fullest expert / mean", extend="max")
    _legend(figure, shown, [])
    return png_of(figure)


def _load(run: RunSeries) -> tuple[np.ndarray, np.ndarray]:
    """(edges in tokens, load [layers, columns]): of lines that share a column the greatest."""
    tokens = run.figure(run.layers[0])[0]
    load = np.array([run.figure(layer)[1] for layer in run.layers])
    columns = min(_HEAT_COLUMNS, len(tokens))
    bounds = np.linspace(0, len(tokens), columns + 1).astype(int)[:-1]
    load = np.fmax.reduceat(load, bounds, axis=1)
    ends = tokens[np.r_[bounds[1:], len(tokens)] - 1]
    return np.r_[0.0, ends], load


def draw_goodput(runs: Sequence[RunSeries]) -> bytes:
    """A bar of shares of the wall time for each run."""
    figure = Figure(figsize=(2 * _WIDTH, 1.3 + 0.55 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for row, run in enumerate(runs):
        left = 0.0
        for part, share in run.goodput.share.items():
            bar = axes.barh(row, share, left=left, height=0.66, color=_PART_COLOURS[part])
            if share >= 0.04:
                dark = part in ("unaccounted", "data", "evaluation", "startup")
                axes.bar_label(bar, [f"{100 * share:.1f} %"], label_type="center", color="black" if dark else "white")
            left += share
    axes.set_yticks(range(len(runs)), [shown_name(run.name) for run in runs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.set_xlabel("share of the wall time since the first launch")
    axes.spines[["top", "right", "left"]].set_visible(False)
    there = [part for part in PARTS if any(run.goodput.seconds[part] for run in runs)]
    handles = [Patch(color=_PART_COLOURS[part], label=PARTS[part]) for part in there]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, max(1, len(there))), frameon=False)
    return png_of(figure)


def draw_progress(runs: Sequence[RunSeries]) -> bytes:
    """Tokens over wall time: where it is flat, nothing was gained."""
    figure = Figure(figsize=(_WIDTH, _AROUND + 1.4 * _ROW), layout="constrained")
    axes = figure.subplots()
    for index, run in enumerate(runs):
        tokens, hours = run.hours()
        dots: dict[str, Any] = {"marker": "o", "markersize": 3} if len(tokens) < 40 else {}
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*thinned(hours, tokens), color=colour, linewidth=1.4, label=shown_name(run.name), **dots)
        begun = run.goodput.lives[0].launched if run.goodput.lives else 0
        for life in run.goodput.lives[1:]:
            at = (life.launched - begun) / 3.6e6
            axes.axvline(at, color=colour if len(runs) > 1 else _MARK, linestyle=_DASHES, linewidth=0.9, alpha=0.6)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda hour, _: short_time(3600 * hour)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("wall time since the first launch (dashed: a life begins)")
    axes.set_ylabel("tokens trained")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(runs) > 1:
        axes.legend(frameon=False)
    return png_of(figure)


def draw_saves(runs: Sequence[RunSeries]) -> bytes:
    """How long each checkpoint held the training up, and until it was committed."""
    figure = Figure(figsize=(_WIDTH, _AROUND + 1.4 * _ROW), layout="constrained")
    grid = figure.subplots(1, 1, squeeze=False)
    axes = grid[0, 0]
    for index, run in enumerate(runs):
        for field, marker, colour, label in (
            ("seconds", "o", COLOURS[2 * index % len(COLOURS)], "until committed"),
            ("stall_s", "x", COLOURS[(2 * index + 1) % len(COLOURS)], "training waited"),
        ):
            x, y = run.of_events("save", field)
            if len(x):
                text = f"{shown_name(run.name)}, {label}" if len(runs) > 1 else label
                axes.plot(x, y, marker, color=colour, markersize=4, label=text)
    axes.set_ylabel("seconds a checkpoint")
    axes.set_ylim(bottom=0)
    _mark(axes, runs)
    _finish_axis(runs, grid)
    _legend(figure, runs, [axes])
    return png_of(figure)


def shown_name(name: str, longest: int = 28) -> str:
    """A name as matplotlib shall show it: short, on one line, and without its mathematics."""
    line = "".join(character if character.isprintable() else "?" for character in name)
    line = line if len(line) <= longest else f"{line[: longest - 12]}…{line[-11:]}"
    line = line.replace("$", r"\$")
    # A label that begins with an underscore is left out of legends.
    return f" {line}" if line.startswith("_") else line


def short_time(seconds: float) -> str:
    """8 s, 12 min, 3.4 h, 5.2 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if abs(seconds) >= (2 * size if unit == "d" else size):
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
