"""Whole lives of a real run on gloo ranks, for `harness.Ranks.run`: stopped, spoilt, interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from harness import RankContext
from training_run import TinyRun

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.ranks import Ranks
from rxt_dist.stages.joint import JointStage
from rxt_dist.train import rollback
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest


def live(
    context: RankContext,
    folder: str,
    shards: str,
    steps: int,
    overrides: list[str],
    stop_at: int = 0,
    poison: tuple[int, int] = (0, 0),
    interrupted: bool = False,
) -> dict[str, Any]:
    """One life.

    Args:
        stop_at: a STOP file is made after this step; 0: the run goes on to its end.
        poison: rows [first, end) with a loss that is not finite.
        interrupted: a life that has noted a way back is killed before it loads anything.
    """
    tiny = TinyRun(Path(folder), Path(shards), steps)
    _make_stop_file(tiny, stop_at)
    _poison(range(*poison))
    if interrupted:
        rollback.load_state = _interrupt
    config = load_run(tiny.file, overrides)
    ranks = Ranks(context.rank, context.world_size, context.rank)
    stop = StopRequest(tiny.directory / "STOP", looks=context.rank == 0)
    try:
        code = int(train(config, ranks, stop))
    except _Interrupted:
        if dist.is_initialized():
            dist.destroy_process_group()
        return {"code": -9}
    store = CheckpointStore(tiny.directory / "checkpoints", 2)
    meta = store.read(store.steps()[-1]).meta
    return {"code": code, "checksum": meta["state_checksum"], "row": meta["position"]["row"]}


class _Interrupted(BaseException):
    pass


def _interrupt(*_: Any, **__: Any) -> None:
    raise _Interrupted


def _make_stop_file(tiny: TinyRun, step: int) -> None:
    line = Reporter.line

    def told(reporter: Reporter, position: Any, *arguments: Any) -> None:
        line(reporter, position, *arguments)
        if position.step == step:
            (tiny.directory / "STOP").touch()

    Reporter.line = told  # type: ignore[method-assign]


def _poison(rows: range) -> None:
    forward = JointStage.forward

    def spoilt(stage: JointStage, micro: Any, load_ME: Any) -> Any:
        output = forward(stage, micro, load_ME)
        struck = any(sample in rows for sample in micro.samples)
        return output._replace(sums_J=output.sums_J * float("nan")) if struck else output

    JointStage.forward = spoilt  # type: ignore[method-assign]
