"""The figures of a tokenizer's report as pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from data_prep.pictures import save_plot


def draw_report(report: dict[str, Any], name: str, out: Path) -> list[Path]:
    """Write the pictures into `out` and return their paths.

    Args:
        report: what `tokenizer_report` returned.
    """
    everyone = {name: report} | report["compared"]
    drawings: dict[str, Callable[[Axes], None]] = {
        "bytes_per_token": lambda axes: _by_language(
            axes, everyone, "bytes_per_token", "bytes a token (more is better)"
        ),
        "tokens_per_word": lambda axes: _by_language(
            axes, everyone, "tokens_per_word", "tokens a word (less is better)"
        ),
        "sources": lambda axes: _sources(axes, report["sources"]),
        "token_lengths": lambda axes: _lengths(axes, report["token_lengths"]),
        "usage": lambda axes: _usage(axes, report),
    }
    return [save_plot(out / f"{title}.png", draw) for title, draw in drawings.items()]


def _by_language(axes: Axes, everyone: dict[str, Any], figure: str, label: str) -> None:
    languages = sorted({language for of_one in everyone.values() for language in of_one["languages"]})
    height = 0.8 / len(everyone)
    for number, (name, of_one) in enumerate(everyone.items()):
        values = [of_one["languages"].get(language, {}).get(figure, 0) for language in languages]
        places = np.arange(len(languages)) + (number - (len(everyone) - 1) / 2) * height
        bars = axes.barh(places, values, height, label=f"{name} ({of_one['vocab_size']:,} ids)")
        axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_yticks(np.arange(len(languages)), languages)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set(xlabel=label, title="Fit by language")
    axes.legend()


def _sources(axes: Axes, sources: dict[str, Any]) -> None:
    bars = axes.barh(list(sources), [of_one["bytes_per_token"] for of_one in sources.values()])
    axes.bar_label(bars, [f"{of_one['tokens_per_word']:.2f} tokens a word" for of_one in sources.values()], padding=3)
    axes.margins(x=0.25)
    axes.invert_yaxis()
    axes.set(xlabel="bytes a token", title="Fit by source")


def _lengths(axes: Axes, lengths: dict[str, Any]) -> None:
    for key, label in (("entries", "entries of the vocabulary"), ("occurrences", "tokens of the text")):
        values = np.array(lengths[key], dtype=float)
        axes.step(lengths["bytes"], 100 * values / max(values.sum(), 1), where="mid", label=label)
    axes.set(xlabel="bytes", ylabel="%", title="How long tokens are")
    axes.legend()


def _usage(axes: Axes, report: dict[str, Any]) -> None:
    usage = report["usage"]
    ranks = np.array(usage["counts_by_rank"]).reshape(-1, 2)
    axes.plot(ranks[:, 0], ranks[:, 1])
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rank of the entry",
        ylabel="occurrences",
        title=f"{usage['unused']:,} of {report['vocab_size']:,} entries unused, {usage['single_use']:,} used once, "
        f"in {report['sample']['bytes'] / 1e6:.1f} MB of text",
    )
