"""`rxt-dist data stats`."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.commands.data.common import DATASET, JSON, emit, print_summary, summary


def stats(dataset: Path = DATASET, as_json: bool = JSON) -> None:
    """Documents, tokens, rows and padding of each source and split.

    Example: `rxt-dist data stats data/mine`.
    """
    from rxt_dist.data.format import load_manifest

    manifest = load_manifest(dataset)
    emit(as_json, summary(dataset, manifest), lambda: print_summary(dataset, manifest))
