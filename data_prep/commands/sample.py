"""`rxt-dist data sample`."""

from __future__ import annotations

from pathlib import Path

import typer

from data_prep.commands.common import JSON, emit
from rxt_dist.errors import ConfigError


def sample(
    out: Path = typer.Argument(..., help="New folder for the corpus."),
    megabytes: float = typer.Option(3.0, min=0.01, help="Text to write, in MB; half English, half Polish."),
    seed: int = typer.Option(0, help="Another seed gives other texts; the same seed the same bytes."),
    interactions: Path | None = typer.Option(
        None, help="New folder for as much again in records: single interactions and dialogues with facts to remember."
    ),
    as_json: bool = JSON,
) -> None:
    """Write a small English and Polish corpus of stories, questions and dialogues.

    Example: `rxt-dist data sample corpus/` and then `rxt-dist data build corpus/ --out data/sample`. For the stages
    after pre-training, `--interactions chats/` writes what `rxt-dist data interactions` reads.
    """
    from data_prep.interactions.synthetic import write_interactions
    from data_prep.synthetic import require_new_folder, write_sample

    size = int(megabytes * 1e6)
    if interactions is not None:
        require_new_folder(interactions)
        one, other = out.resolve(), interactions.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise ConfigError(f"--interactions {interactions} and {out} lie within each other. Name two folders.")
    files = write_sample(out, size, seed)
    total = sum(written for _, written in files)
    records = write_interactions(interactions, size, seed) if interactions is not None else []

    def show() -> None:
        print(f"Wrote {len(files)} files, {total / 1e6:.1f} MB, to {out}.")
        print(f"Next: rxt-dist data build {out} --out DIR")
        if interactions is not None:
            print(f"Wrote {len(records)} files of interactions to {interactions}.")
            print(f"Next: rxt-dist data interactions {interactions}/single --tokenizer tokenizer.json --seq-len 256 "
                  f"--out DIR")  # fmt: skip

    value = {"out": str(out), "files": dict(files), "bytes": total}
    if interactions is not None:
        value["interactions"] = {"out": str(interactions), "files": dict(records)}
    emit(as_json, value, show)
