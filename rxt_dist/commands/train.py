"""`rxt-dist train`: one rank of a training run."""

from __future__ import annotations

import faulthandler
import os
from typing import Annotated

import typer

from rxt_dist.commands.arguments import Overrides, Profiled, RunFile, TimeLimited, with_time_limit

_STDERR = 2


def train(
    run: RunFile,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check the configuration for its cluster's ranks, print it resolved, and stop; data is not read.",
        ),
    ] = False,
    profile: Profiled = None,
    from_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="step-N",
            help="Begin at this checkpoint of the run; later ones are set aside, none is deleted. Rows that were "
            "passed over by a later decision are trained on again.",
        ),
    ] = None,
    time_limit: TimeLimited = None,
) -> None:
    """Train. Start one process per rank, with torchrun, srun or `rxt-dist launch local`; alone it is the only rank."""
    from rxt_dist.config.load import load_run, resolved_yaml
    from rxt_dist.config.validate import settle_topology, validate_run
    from rxt_dist.lasting import lasting_imports
    from rxt_dist.leaving import native_threads_remain
    from rxt_dist.lives import Life, old_file
    from rxt_dist.ranks import export_ranks, read_ranks

    from_step = _step(from_checkpoint)
    life = Life.of_process(os.environ)
    config = load_run(run, with_time_limit(overrides, time_limit))
    ranks = read_ranks(os.environ)
    if dry_run:
        # On a login node there is one rank; the cluster that the run is meant for counts, but not for plain torch.
        alone = ranks.world_size == 1 and config.parallel.engine != "plain"
        world_size = config.cluster.ranks if alone else ranks.world_size
        config = settle_topology(config, world_size)
        validate_run(config, world_size, None)
        typer.echo(resolved_yaml(config), nl=False)
        return
    config = settle_topology(config, ranks.world_size)
    validate_run(config, ranks.world_size, None)
    export_ranks(ranks, os.environ)
    native_threads_remain()
    # What ends this process from within native code leaves the stacks of its threads where its output goes.
    faulthandler.enable(_STDERR)
    from rxt_dist.train.signals import StopRequest
    from rxt_dist.train.time_limit import TimeLimit

    stop_file = config.directory / "STOP"
    old_stop = old_file(stop_file, life.launched) if life.old_stop is None else life.old_stop
    limit = TimeLimit.of(config.train.time_limit, life) if config.train.time_limit else None
    # Signals are caught before torch is imported: that takes seconds, in which a stop would otherwise kill the rank.
    with StopRequest(stop_file, ranks.rank == 0, old_stop, limit, life.stop_request) as stop:
        with lasting_imports():
            # Networks and optimizers of torch import it when they are made.
            import torch._dynamo  # noqa: F401

            from rxt_dist.train.run import train as run_training

        raise typer.Exit(int(run_training(config, ranks, stop, profile or 0, life, from_step)))


def _step(name: str | None) -> int | None:
    """The step of `step-N`, `step-0000000N` or `N`."""
    from rxt_dist.errors import ConfigError

    digits = (name or "").removeprefix("step-")
    if name is None:
        return None
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise ConfigError(f"--from is '{name}', but a checkpoint is named step-N, for example --from step-120.")
    return int(digits)
