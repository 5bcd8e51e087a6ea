"""`rxt-dist launch`: start all ranks of a run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from rxt_dist.commands.arguments import Overrides, Profiled, RunFile

app = typer.Typer(help="Start the ranks of a run.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Keep `local` a verb of its own: typer runs the only verb of a group without its name."""


@app.command()
def local(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=256, help="Ranks on this machine; default: cluster.gpus_per_node.")
    ] = None,
    resume_attempts: Annotated[
        int, typer.Option(min=0, help="How often to start again after a preemption or a crash.")
    ] = 0,
    profile: Profiled = None,
) -> None:
    """Start all ranks on this machine, pass signals on to them, and return what they return.

    TERM, USR1 and USR2 to this process mean: save and stop; so does the file STOP in the run directory. Ctrl-C is
    passed on too. After a signal to this process nothing is started again.
    """
    from launch.local import launch
    from rxt_dist.config.load import load_run
    from rxt_dist.config.validate import settle_topology, validate_run

    config = load_run(run, overrides or [])
    number = ranks or config.cluster.gpus_per_node
    validate_run(settle_topology(config, number), number, None)
    options = ["--profile", str(profile)] if profile else []
    command = [sys.executable, "-m", "rxt_dist", "train", str(run), *(overrides or []), *options]
    raise typer.Exit(launch(command, number, resume_attempts))
