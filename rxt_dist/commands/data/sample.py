"""`rxt-dist data sample`."""

from __future__ import annotations

from pathlib import Path

import typer

from rxt_dist.commands.data.common import JSON, emit


def sample(
    out: Path = typer.Argument(..., help="New folder for the corpus."),
    megabytes: float = typer.Option(3.0, min=0.01, help="Text to write, in MB; half English, half Polish."),
    seed: int = typer.Option(0, help="Another seed gives other texts; the same seed the same bytes."),
    as_json: bool = JSON,
) -> None:
    """Write a small English and Polish corpus of stories, questions and dialogues.

    Example: `rxt-dist data sample corpus/` and then `rxt-dist data build corpus/ --out data/sample`.
    """
    from data_prep.synthetic import write_sample

    files = write_sample(out, int(megabytes * 1e6), seed)
    total = sum(size for _, size in files)

    def show() -> None:
        print(f"Wrote {len(files)} files, {total / 1e6:.1f} MB, to {out}.")
        print(f"Next: rxt-dist data build {out} --out DIR")

    emit(as_json, {"out": str(out), "files": dict(files), "bytes": total}, show)
