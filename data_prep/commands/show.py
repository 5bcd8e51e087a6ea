"""`rxt-dist data show`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_prep.commands.common import DATASET, JSON, emit
from data_prep.commands.order import order_of
from data_prep.commands.place import Place
from rxt_dist.errors import ConfigError, nearest

if TYPE_CHECKING:
    from rxt_dist.config.run import RunConfig
    from rxt_dist.config.schedules import Step
    from rxt_dist.data.dialogues import AnyManifest


def show(
    dataset: Path = DATASET,
    position: int | None = typer.Option(None, min=0, help="Global position: which row of the training order."),
    run: Path | None = typer.Option(None, help="A run file (its mixture and seed) or a data file (its mixture)."),
    seed: int | None = typer.Option(None, min=0, help="Seed of the order; default: the run's, else 0."),
    step: int | None = typer.Option(None, min=1, help="Instead of a position: the first row of a step of the run."),
    rank: int = typer.Option(0, min=0, help="With --step: the first row that this rank read."),
    ranks: int = typer.Option(1, min=1, help="With --step: ranks of the run."),
    source: str | None = typer.Option(None, help="Instead of a position: a row of this source, whatever the order."),
    row: int = typer.Option(0, min=0, help="With --source: which of its rows."),
    held_out: bool = typer.Option(False, "--held-out", help="With --source: of those that are only evaluated."),
    ids: bool = typer.Option(False, "--ids", help="The token ids as well."),
    mlm: bool = typer.Option(False, "--mlm", help="What the encoder of the run saw: masked tokens as [MASK]."),
    trace: bool = typer.Option(False, "--trace", help="Read the source of each document again, and name its record."),
    as_json: bool = JSON,
) -> None:
    """Show exactly the row that training reads at a global position, decoded, document by document or turn by turn.

    Without --run the sources are mixed in proportion to their size, as by a run without `data.mixture`. A position
    beyond the last row belongs to a later epoch. Of a dialogue it shows what each turn recalls.

    Example: `rxt-dist data show data/mine --position 0`, what step 120 of a run began with:
    `rxt-dist data show data/mine --run configs/run/mine.yaml --step 120`, or any row: `--source en --row 7`.
    """
    from data_prep.commands.show_dialogue import dialogue_at, print_dialogue
    from data_prep.commands.show_row import print_row, row_at
    from rxt_dist.data.dialogues import DialogueManifest, load_any_manifest

    manifest, config = load_any_manifest(dataset), None
    if source is None:
        place, config = _read(dataset, manifest, position, run, seed, step, rank, ranks)
        if row or held_out:
            raise ConfigError("--row and --held-out choose among the rows of a source: name it (--source).")
    else:
        if mlm or not (position is step is run is None):
            raise ConfigError("--source names a row by itself: leave out --position, --step, --run and --mlm.")
        place = _named(dataset, manifest, source, row, "eval" if held_out else "train")
    if isinstance(manifest, DialogueManifest):
        if mlm or trace:
            raise ConfigError(f"{dataset} holds dialogues: nothing masks them, and they keep no origin. Leave out "
                              f"--mlm and --trace.")  # fmt: skip
        turns = getattr(config.stage, "turns", None) if config else None
        shown = dialogue_at(place, turns, ids)
        emit(as_json, shown, lambda: print_dialogue(place, shown))
        return
    value = row_at(place, config, mlm, ids, trace)
    emit(as_json, value, lambda: print_row(place, value))


def _read(
    dataset: Path,
    manifest: AnyManifest,
    position: int | None,
    run: Path | None,
    seed: int | None,
    step: int | None,
    rank: int,
    ranks: int,
) -> tuple[Place, RunConfig | None]:
    """What a training reads at a position."""
    import numpy as np

    order, read, config = order_of(dataset, manifest, run, seed)
    at = _position(position, step, rank, ranks, config, read.seq_len)
    source_R, row_R = order.rows(np.array([at]))
    of, source = read.own(int(source_R[0]))
    called = read.sources[int(source_R[0])].name
    number = _step_of(at, config, read.seq_len) if config else None
    place = Place(of.path, source, called, int(row_R[0]), "train", at, order.epoch(at), config is not None, number)
    return place, config


def _named(dataset: Path, manifest: AnyManifest, name: str, row: int, split: str) -> Place:
    """The row that a person names."""
    from rxt_dist.data.dialogues import DialogueTotals

    names = [source.name for source in manifest.sources]
    if name not in names:
        raise ConfigError(f"{dataset} has no source '{name}'; it has {', '.join(names)}.{nearest(name, names)}")
    number = names.index(name)
    totals = manifest.sources[number].split(split).totals
    rows = totals.dialogues if isinstance(totals, DialogueTotals) else totals.rows
    if row >= rows:
        raise ConfigError(f"--row is {row}, but {name}/{split} has {rows:,} rows, counted from 0.")
    return Place(dataset, number, name, row, split)


def _position(
    position: int | None, step: int | None, rank: int, ranks: int, run: RunConfig | None, seq_len: int
) -> int:
    if (position is None) == (step is None):
        raise ConfigError("Give either --position or, for a run, --step; or name a row by --source.")
    if step is None:
        assert position is not None
        return position
    if run is None:
        raise ConfigError("--step needs --run with a run file: the size of a step is the run's.")
    if rank >= ranks:
        raise ConfigError(f"--rank is {rank}, but there are {ranks} ranks, counted from 0 (--ranks).")
    for number, taken in _steps(run, seq_len):
        if number == step:
            if taken.rows % ranks:
                raise ConfigError(f"Step {step} has {taken.rows} rows, which {ranks} ranks cannot share equally.")
            return taken.first + rank * (taken.rows // ranks)
    raise ConfigError(f"--step is {step}, but the run ends before it (train.total_tokens {run.train.total_tokens:,}).")


def _steps(run: RunConfig, seq_len: int) -> Iterator[tuple[int, Step]]:
    """Every step with its number, from 1."""
    from rxt_dist.config.schedules import steps

    return enumerate(steps(run.train, seq_len), start=1)


def _step_of(position: int, run: RunConfig, seq_len: int) -> int | None:
    """The step that read a position; None for one beyond the end of the run."""
    return next((number for number, taken in _steps(run, seq_len) if position < taken.end), None)
