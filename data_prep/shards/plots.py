"""The figures of `statistics` as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from data_prep.pictures import save_plot
from data_prep.shards.statistics import Scan


def draw_statistics(
    figures: dict[str, Any], plan: list[dict[str, Any]] | None, scans: dict[tuple[str, str], Scan], out: Path
) -> list[Path]:
    """Write a handful of PNG files into `out` and return their paths.

    Args:
        figures: what `statistics` returned.
        plan: `source` and `epochs` of each source under the mixture of a run; None: there is none to draw.
        scans: what `scan_dataset` returned.
    """
    out.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, Callable[[Axes], None]] = {
        "lengths": lambda axes: _lengths(axes, scans),
        "sources": lambda axes: _sources(axes, figures),
        "bytes_per_token": lambda axes: _bytes_per_token(axes, figures),
        "ids": lambda axes: _ids(axes, scans),
    }
    if plan is not None:
        drawings["epochs"] = lambda axes: _epochs(axes, plan)
    return [save_plot(out / f"{name}.png", draw) for name, draw in drawings.items()]


def _lengths(axes: Axes, scans: dict[tuple[str, str], Scan]) -> None:
    longest = max((int(scan.lengths.max(initial=2)) for scan in scans.values()), default=2)
    edges = np.geomspace(2, longest + 1, 60)
    for (source, split), scan in scans.items():
        if split == "train" and len(scan.lengths):
            density = np.histogram(scan.lengths, edges)[0] / len(scan.lengths)
            axes.stairs(100 * density, edges, label=f"{source} (median {np.median(scan.lengths):,.0f})")
    axes.set(xscale="log", xlabel="tokens of a document", ylabel="% of the documents", title="Lengths of documents")
    axes.legend()


def _sources(axes: Axes, figures: dict[str, Any]) -> None:
    names = list(figures["sources"])
    tokens = [figures["sources"][name]["tokens"] for name in names]
    bars = axes.barh(names, tokens)
    axes.bar_label(bars, [f"{100 * figures['sources'][name]['share']:.1f} %" for name in names], padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set(xlabel="tokens", title="Tokens and share of each source")


def _bytes_per_token(axes: Axes, figures: dict[str, Any]) -> None:
    names = list(figures["sources"])
    bars = axes.barh(names, [figures["sources"][name]["bytes_per_token"] for name in names])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel="bytes of text a token", title="How well the tokenizer fits")


def _ids(axes: Axes, scans: dict[tuple[str, str], Scan]) -> None:
    for (source, split), scan in scans.items():
        counts = np.sort(scan.ids[scan.ids > 0])[::-1]
        if split == "train" and len(counts):
            axes.plot(np.arange(1, len(counts) + 1), counts / counts.sum(), label=f"{source} ({len(counts):,} ids)")
    axes.set(xscale="log", yscale="log", xlabel="rank of the id", ylabel="share of the tokens",
             title="How often each id is used")  # fmt: skip
    axes.legend()


def _epochs(axes: Axes, plan: list[dict[str, Any]]) -> None:
    bars = axes.barh([item["source"] for item in plan], [item["epochs"] for item in plan])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel="passes over the source", title="Epochs under the mixture")
