"""`rxt-dist launch`: start all ranks of a run."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

import launch.slurm.commands as slurm
from rxt_dist.commands.arguments import (
    AsJson,
    ChainFile,
    ChainOverrides,
    Overrides,
    Profiled,
    RunFile,
    TimeLimited,
    with_time_limit,
)

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


def pipeline(
    chain: ChainFile,
    overrides: ChainOverrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="Ranks on this machine; default: each run's cluster.gpus_per_node."),
    ] = None,
    resume_attempts: Annotated[
        int, typer.Option(min=0, help="How often to start a link again, as `launch local` does.")
    ] = 0,
    time_limit: Annotated[
        str | None, typer.Option("--time-limit", metavar="3h50m", help="Save and end with 75 before this time is over.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Show how far each link is, and do nothing.")] = False,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all links, and stop.")] = False,
) -> None:
    """Run a chain of runs on this machine: each link begins with the weights of those before it.

    All links are checked before the first step. What is finished is passed over, so that the same command goes on
    after whatever ended it; the exit code is that of the link that ended. Signals, and a file STOP in the chain's
    folder, reach the link that runs.

    Example: rxt-dist pipeline configs/chain/demo.yaml --ranks 2
    """
    from launch.pipeline import Options, Pipeline, check
    from rxt_dist.config.chain import load_chain
    from rxt_dist.config.duration import seconds_of
    from rxt_dist.errors import ConfigError
    from rxt_dist.lives import Life, old_file
    from rxt_dist.train.chain_dir import ChainDirectory

    loaded = load_chain(chain, overrides or [])
    if status:
        from rxt_dist.report.chain import link_states, status_lines

        states = link_states(loaded)
        typer.echo(json.dumps(states, indent=2, ensure_ascii=False) if as_json else "\n".join(status_lines(states)))
        return
    if time_limit is not None:
        try:
            seconds_of(time_limit)
        except ValueError as error:
            raise ConfigError(f"--time-limit: {error}.") from error
    folder = ChainDirectory(loaded)
    folder.require_free()
    old_stop = old_file(folder.stop_file, Life.of_process({}).launched)
    check(chain, overrides or [], ranks)
    if dry_run:
        typer.echo(f"chain '{loaded.name}': {len(loaded.links)} links, nothing is wrong with any.")
        return
    raise typer.Exit(Pipeline(loaded, Options(ranks, resume_attempts, time_limit), old_stop=old_stop).run())


app.command("slurm")(slurm.slurm)
app.command("slurm-data")(slurm.slurm_data)
app.command("status")(slurm.status)
app.command("stop")(slurm.stop)
app.command("resume")(slurm.resume)
