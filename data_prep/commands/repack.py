"""`rxt-dist data repack`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer

from data_prep.commands.common import DATASET, JSON, emit, print_summary, progress_bytes, say, summary


def repack(
    dataset: Path = DATASET,
    seq_len: int = typer.Option(..., help="Tokens a row of the new dataset."),
    out: Path = typer.Option(..., help="Its folder; interrupted work is finished by running the command again."),
    workers: int = typer.Option(os.cpu_count() or 1, min=1, help="Processes; they change the speed, not the result."),
    as_json: bool = JSON,
) -> None:
    """Pack the documents of a dataset into rows of another length, without reading or tokenising any text.

    One build serves models of several context lengths: every document, split and source stays what it is.
    Example: `rxt-dist data repack data/mine --seq-len 1024 --out data/mine-1024`.
    """
    from data_prep.shards.repack import RepackRequest
    from data_prep.shards.repack import repack as run

    started = time.monotonic()
    with progress_bytes("Repacking") as progress:
        result = run(
            RepackRequest(dataset, out, seq_len, workers), say, lambda now: progress(now.bytes, now.total_bytes)
        )
    seconds = time.monotonic() - started
    value = summary(out, result.manifest) | {
        "units": result.units,
        "units_kept": result.units_kept,
        "seconds": round(seconds, 3),
    }

    def show() -> None:
        print_summary(out, result.manifest)
        print(f"{result.units_kept} of {result.units} units were already finished. {seconds:.1f} s.")

    emit(as_json, value, show)
