"""`rxt-dist data repack`."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from data_prep.commands.common import (
    DATASET,
    JSON,
    TASK,
    TASKS,
    WORKERS,
    emit,
    emit_unfinished,
    print_summary,
    progress_units,
    say,
    summary,
)


def repack(
    dataset: Path = DATASET,
    seq_len: int = typer.Option(..., help="Tokens a row of the new dataset."),
    out: Path = typer.Option(..., help="Its folder; interrupted work is finished by running the command again."),
    workers: int = WORKERS,
    task: int | None = TASK,
    tasks: int | None = TASKS,
    as_json: bool = JSON,
) -> None:
    """Pack the documents of a dataset into rows of another length, without reading or tokenising any text.

    One build serves models of several context lengths: every document, split and source stays what it is.
    Example: `rxt-dist data repack data/mine --seq-len 1024 --out data/mine-1024`.

    As a job array, on nodes that share the folder: add `--task $SLURM_ARRAY_TASK_ID --tasks 64`; the task that ends
    last finishes the dataset.
    """
    from data_prep.shards.repack import RepackRequest
    from data_prep.shards.repack import repack as run

    started = time.monotonic()
    request = RepackRequest(dataset, out, seq_len, workers=workers, task=task, tasks=tasks)
    with progress_units() as progress:
        result = run(request, say, progress)
    manifest = result.manifest
    if manifest is None:
        emit_unfinished(as_json, out, result)
        return
    seconds = time.monotonic() - started
    value = summary(out, manifest) | {
        "units": result.units,
        "units_kept": result.units_kept,
        "seconds": round(seconds, 3),
    }

    def show() -> None:
        print_summary(out, manifest)
        print(f"{result.units_kept} of {result.units} units were already finished. {seconds:.1f} s.")

    emit(as_json, value, show)
