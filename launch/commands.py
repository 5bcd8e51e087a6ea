"""`rxt-dist launch`: start all ranks of a run."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import launch.slurm.commands as slurm
from rxt_dist.commands.arguments import Overrides, Profiled, RunFile, TimeLimited, with_time_limit

app = typer.Typer(help="Start the ranks of a run.", no_args_is_help=True)


@app.command()
def local(
    run: RunFile,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None, typer.Option(min=1, max=256, help="Ranks on this machine; default: cluster.gpus_per_node.")
    ] = None,
    resume_attempts: Annotated[
        int,
        typer.Option(
            min=0, help="How often to start again after a preemption or a crash; a new checkpoint restores them."
        ),
    ] = 0,
    profile: Profiled = None,
    time_limit: TimeLimited = None,
    from_checkpoint: Annotated[
        str | None,
        typer.Option("--from", metavar="step-N", help="Begin at this checkpoint, once (see `train`)."),
    ] = None,
) -> None:
    """Start all ranks on this machine, pass signals on to them, and return what they return.

    TERM, USR1, USR2 and HUP to this process mean: save and stop; so does the file STOP in the run directory. A second
    signal and Ctrl-C end all ranks at once. After a signal to this process or a STOP nothing is started again.
    """
    from launch.local import Launch, launch
    from launch.watching import Patience
    from rxt_dist.config.duration import seconds_of
    from rxt_dist.config.load import load_run
    from rxt_dist.config.validate import settle_topology, validate_run
    from rxt_dist.lives import Life, old_file

    overrides = with_time_limit(overrides, time_limit)
    config = load_run(run, overrides)
    number = ranks or config.cluster.gpus_per_node
    validate_run(settle_topology(config, number), number, None)
    options = ["--profile", str(profile)] if profile else []
    command = [sys.executable, "-m", "rxt_dist", "train", str(run), *overrides, *options]
    seconds = seconds_of(config.train.time_limit) if config.train.time_limit else None
    # One that was made while this process read its configuration is meant for this launch.
    old_stop = old_file(config.directory / "STOP", Life.of_process({}).launched)
    once = ["--from", from_checkpoint] if from_checkpoint is not None else []
    patience = Patience.of(config.health.deadlines)
    wanted = Launch(command, number, resume_attempts, config.directory, seconds, old_stop, once, patience)
    raise typer.Exit(launch(wanted))


app.command("slurm")(slurm.slurm)
app.command("slurm-data")(slurm.slurm_data)
app.command("status")(slurm.status)
app.command("stop")(slurm.stop)
app.command("resume")(slurm.resume)
