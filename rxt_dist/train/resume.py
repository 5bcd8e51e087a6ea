"""Where a run stands when a life of it begins: new, begun from other weights, to be resumed, or finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rxt_dist.checkpoint.frozen import load_frozen
from rxt_dist.checkpoint.start import choose_origin, fill_from
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.run import RunConfig
from rxt_dist.data.sampler import DataState
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import DataSource, Stage


@dataclass(frozen=True)
class Position:
    """How far training is: steps taken, updates applied, rows delivered, tokens that were not padding."""

    step: int = 0
    applied: int = 0
    row: int = 0
    tokens_seen: int = 0
    skipped_in_a_row: int = 0


def find_checkpoint(group: Collectives, store: CheckpointStore) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, chosen by rank 0 for all, and what there is to say about rejected ones.

    Raises:
        CheckpointError: there are checkpoints, but none is valid. Starting again from nothing would destroy them and
            the run's history, when perhaps a disk is only not mounted.
    """

    def find() -> tuple[Checkpoint | None, list[str]]:
        remarks: list[str] = []
        found = store.latest_valid(remarks.append)
        if found is None and any(info.committed for info in store.list()):
            raise CheckpointError(
                f"No checkpoint in {store.directory} is valid, and this run will not start again from nothing over "
                f"them. {' '.join(remarks)} Restore the files, or remove the folder to start over."
            )
        return found, remarks

    return group.together(lambda: find() if group.rank == 0 else (None, []))[0]


def position_of(checkpoint: Checkpoint, data: DataSource) -> Position:
    """The position of a checkpoint.

    Raises:
        DataError: the data is not what it was trained on.
        CheckpointError: the position was written by another version.
    """
    DataState.from_dict(checkpoint.meta["data"]).check(data.order, data.digest)
    try:
        return Position(**checkpoint.meta["position"])
    except TypeError as error:
        raise CheckpointError(
            f"The position in {checkpoint.path} is {checkpoint.meta['position']}, which this version of the program "
            "does not understand. Resume with the version named in its manifest."
        ) from error


def set_weights(
    stage: Stage, config: RunConfig, checkpoint: Checkpoint | None, group: Collectives
) -> tuple[dict[str, Any] | None, list[str]]:
    """Give the stage's model the weights that it has before an engine takes it; what is trained of a checkpoint comes
    later, into the engine.

    Returns the origin of weights that did not begin afresh (None: all did), and what there is to say about it.
    """
    if checkpoint is not None:
        load_frozen(stage.model, checkpoint)
        return checkpoint.meta.get("origin"), []
    initialise(stage.model, config.seed)
    start = config.start
    if start is None:
        return None, []
    remarks: list[str] = []
    found = group.together(lambda: choose_origin(start, remarks.append) if group.rank == 0 else None)[0]
    assert found is not None
    origin, chosen = found
    group.together(lambda: fill_from(start, chosen, stage.model))
    at = f"step {origin.step} of {origin.path}" if origin.step is not None else origin.path
    fresh = [part for part in config.stage.parts() if part not in start.parts]
    remarks.append(f"weights: {', '.join(start.parts)} from {at}; afresh: {', '.join(fresh) or 'nothing'}")
    return origin.to_dict(), remarks
