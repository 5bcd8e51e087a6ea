"""`rxt-dist data plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import JSON, emit, print_table, warn_of_phases
from rxt_dist.commands.arguments import Overrides
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from data_prep.documents.cost import Assumptions, BuildCost, SourceCost
    from rxt_dist.config.run import DataConfig


def plan(
    file: Path = typer.Argument(..., metavar="DATA.yaml", help="A data file with `build:`."),
    overrides: Overrides = None,
    tasks: int = typer.Option(1, min=1, help="Jobs of a job array."),
    workers: int = typer.Option(1, min=1, help="Processes of each job."),
    rate: float | None = typer.Option(
        None, min=0.001, help="Million tokens a second of one core; without it the measured one of docs/benchmarks.md."
    ),
    measure: Path | None = typer.Option(
        None, help="Try the build on up to 20 MB of this file or folder, and take its rate and bytes per token."
    ),
    bytes_per_token: list[str] = typer.Option(
        [], metavar="LANGUAGE=BYTES", help="Bytes of text a token, as pl=3.8; may be given several times."
    ),
    as_json: bool = JSON,
) -> None:
    """Tell what a build comes to before it is started: units, tokens, rows, shards, disk, hours.

    Example: `rxt-dist data plan configs/data/beta-400b.yaml --tasks 64 --workers 8`. Sizes are those of the inputs
    where they are there, and else the published ones that the data file gives. The last line is the command that
    builds it as a job array.
    """
    from data_prep.documents.cost import BYTES_PER_TOKEN, Assumptions, default_rate, estimate
    from data_prep.documents.cost import measure as try_build
    from rxt_dist.config.load import load_data

    data = load_data(file, overrides or [])
    warn_of_phases(data)
    per_token = dict(BYTES_PER_TOKEN)
    origin = "the backend's without filters (docs/benchmarks.md)"
    if measure is not None:
        trial = try_build([measure], data)
        per_token |= trial.bytes_per_token
        rate, origin = (
            rate or trial.rate,
            f"measured with {trial.backend} on {trial.text_bytes / 1e6:.1f} MB of {measure}",
        )
    elif rate is not None:
        origin = "given"
    elif data.build is not None:
        rate = default_rate(data.build.backend)
    per_token |= _parsed(bytes_per_token)
    assumptions = Assumptions(rate or 1.0, per_token)
    cost = estimate(data, assumptions, tasks)
    command = _array_job(file, overrides or [], tasks, workers)
    emit(
        as_json,
        _value(data, cost, assumptions, origin, workers, command),
        lambda: _print(file, data, cost, assumptions, origin, workers, command),
    )


def _parsed(pairs: list[str]) -> dict[str, float]:
    values = {}
    for pair in pairs:
        language, _, number = pair.partition("=")
        try:
            values[language] = float(number)
        except ValueError:
            values[language] = 0.0
        if not language or not 0 < values[language] < 100:
            raise ConfigError(f"--bytes-per-token is '{pair}'; it has the form LANGUAGE=BYTES, as in pl=3.8.")
    return values


def _array_job(file: Path, overrides: list[str], tasks: int, workers: int) -> str:
    """The command that builds it: a Slurm job array, or the build itself where one job does it."""
    import shlex

    build = shlex.join(["rxt-dist", "data", "build", str(file), *overrides])
    if tasks == 1:
        return f"{build} --workers {workers}"
    inside = f"{build} --task $SLURM_ARRAY_TASK_ID --tasks {tasks} --workers {workers}"
    return f"sbatch --array=0-{tasks - 1} --cpus-per-task={workers} --wrap {shlex.quote(inside)}"


def _value(
    data: DataConfig, cost: BuildCost, assumptions: Assumptions, origin: str, workers: int, command: str
) -> dict[str, Any]:
    return {
        "path": str(data.path),
        "seq_len": data.seq_len,
        "sources": {source.name: vars(source) for source in cost.sources},
        "total": vars(cost.total),
        "tasks": cost.tasks,
        "workers": workers,
        "largest_task_units": cost.largest_task_units,
        "hours": cost.hours(workers),
        "assumptions": {**vars(assumptions), "rate_origin": origin},
        "notes": list(cost.notes),
        "command": command,
    }


def _print(
    file: Path, data: DataConfig, cost: BuildCost, assumptions: Assumptions, origin: str, workers: int, command: str
) -> None:
    print_table(
        f"{file}: rows of {data.seq_len}, to {data.path}",
        ["source", "language", "size from", "text GB", "documents", "tokens", "rows", "units", "shards", "disk GB",
         "core-hours"],
        [_row(source) for source in (*cost.sources, cost.total)],
    )  # fmt: skip
    lengths = ", ".join(f"{language} {size:g}" for language, size in assumptions.bytes_per_token.items())
    print(
        f"Bytes of text a token: {lengths}, others 4 (change with --bytes-per-token). {assumptions.rate:g} million "
        f"tokens a second and core: {origin}. What filters and duplicates take away is not taken off. Core-hours are "
        f"time of processors; reading the inputs and writing the shards take what the file system takes."
    )
    for note in (*cost.notes, *_second_run(data, cost)):
        print(note)
    print(
        f"{cost.tasks} task{'s' * (cost.tasks > 1)} of {workers} process{'es' * (workers > 1)}: at most "
        f"{cost.largest_task_units:,} units in one, {_duration(cost.hours(workers))}. It is built by:\n\n  {command}"
    )


def _second_run(data: DataConfig, cost: BuildCost) -> list[str]:
    clean = data.build.clean if data.build else None
    if clean is None or cost.tasks == 1 or not (clean.exact_duplicates or clean.near_duplicates):
        return []
    return [
        "Duplicates are looked for before anything is built: run the array again when it has ended (not in the hours)."
    ]


def _row(source: SourceCost) -> list[str]:
    return [
        source.name,
        source.language,
        source.origin,
        f"{source.text_bytes / 1e9:,.2f}",
        f"{source.documents:,}",
        f"{source.tokens:,}",
        f"{source.rows:,}",
        f"{source.units:,}",
        f"{source.shards:,}",
        f"{source.disk_bytes / 1e9:,.2f}",
        f"{source.core_hours:,.2f}",
    ]


def _duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{hours * 60:,.1f} minutes"
