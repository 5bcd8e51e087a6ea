"""Ranks that begin a life of a run of which one cannot, for `harness.Ranks.run`."""

from __future__ import annotations

from pathlib import Path

from harness import RankContext
from training_run import SHARED_BY_TWO, TinyRun

from rxt_dist.config.load import load_run
from rxt_dist.errors import UserError
from rxt_dist.ranks import Ranks
from rxt_dist.train.run import train
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest


def begin_a_life(context: RankContext, folder: str, shards: str, trouble: str) -> list[str]:
    """What each rank ends with, when a file that only one of them opens cannot be opened.

    trouble: a path in the run directory at which a folder stands; "lock": another process trains the run.
    """
    tiny = TinyRun(Path(folder), Path(shards), 2)
    if context.rank == 0 and trouble == "lock":
        with RunDirectory(tiny.directory).locked():
            return _end_of(context, tiny)
    return _end_of(context, tiny)


def _end_of(context: RankContext, tiny: TinyRun) -> list[str]:
    config = load_run(tiny.file, ["parallel.engine=deepspeed", "parallel.zero=1", SHARED_BY_TWO])
    ranks = Ranks(context.rank, context.world_size, context.rank)
    try:
        return [str(train(config, ranks, StopRequest(tiny.directory / "STOP", looks=context.rank == 0)))]
    except UserError as error:
        return [type(error).__name__, str(error), str(error.common)]
