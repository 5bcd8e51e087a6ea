"""Where a run stands when a life of it begins: new, begun from other weights, to be resumed, or finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.start import Origin, choose_origin, chosen_checkpoint, fill_from
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.run import RunConfig
from rxt_dist.data.sampler import DataState
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import WEIGHT, Engine
from rxt_dist.errors import CheckpointError
from rxt_dist.model.init import InitialWeights
from rxt_dist.stages.base import DataSource


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

    def find() -> tuple[int | None, list[str]]:
        remarks: list[str] = []
        found = store.latest_valid(remarks.append)
        if found is None and store.steps():
            raise CheckpointError(
                f"No checkpoint in {store.directory} is valid, and this run will not start again from nothing over "
                f"them. {' '.join(remarks)} Restore the files, or remove the folder to start over."
            )
        return found.step if found else None, remarks

    step, remarks = group.together(lambda: find() if group.rank == 0 else None)[0]
    return None if step is None else store.read(step), remarks


def position_of(checkpoint: Checkpoint, data: DataSource) -> Position:
    """The position of a checkpoint.

    Raises:
        DataError: the data is not what it was trained on.
        CheckpointError: the position was written by another version.
    """
    DataState.from_dict(checkpoint.meta["data"]).check(data.order, data.digests)
    try:
        return Position(**checkpoint.meta["position"])
    except TypeError as error:
        raise CheckpointError(
            f"The position in {checkpoint.path} is {checkpoint.meta['position']}, which this version of the program "
            "does not understand. Resume with the version named in its manifest."
        ) from error


@dataclass(frozen=True)
class Beginning:
    """Where the weights of a life come from.

    origin: of those of the run that did not begin afresh; None: all did. remarks: what there is to say about it.
    chosen: the checkpoint of another run from which this life takes some.
    """

    origin: dict[str, Any] | None = None
    remarks: tuple[str, ...] = ()
    chosen: Checkpoint | None = None


def choose_beginning(config: RunConfig, checkpoint: Checkpoint | None, group: Collectives) -> Beginning:
    """Where the weights will come from, verified; of a life that resumes, where its run once began."""
    if checkpoint is not None:
        return Beginning(checkpoint.meta.get("origin"))
    start = config.start
    if start is None:
        return Beginning()
    remarks: list[str] = []
    found = group.together(lambda: choose_origin(start, remarks.append).to_dict() if group.rank == 0 else None)[0]
    origin = Origin(**{**found, "parts": tuple(found["parts"])})
    at = f"step {origin.step} of {origin.path}" if origin.step is not None else origin.path
    fresh = [part for part in config.stage.parts() if part not in start.parts]
    remarks.append(f"weights: {', '.join(start.parts)} from {at}; afresh: {', '.join(fresh) or 'nothing'}")
    return Beginning(origin.to_dict(), tuple(remarks), chosen_checkpoint(start, origin))


def set_weights(
    engine: Engine, frozen: FrozenWeights, config: RunConfig, initial: InitialWeights, beginning: Beginning
) -> None:
    """Write the first weights of a run into an engine that has none: each rank those that it holds, as float32 where
    they are trained. All ranks together."""
    start = config.start
    taken = start.parts if start is not None else ()
    fragments = [*engine.fragments(owned=False), *engine.frozen_fragments(), *frozen.fragments()]
    runs = [(piece.name, piece.start, piece.tensors[WEIGHT]) for piece in fragments]
    initial.fill(run for run in runs if run[0].split(".")[0] not in taken)
    if start is not None:
        theirs = [run for run in runs if run[0].split(".")[0] in taken]
        engine.ranks.together(lambda: fill_from(start, beginning.chosen, theirs))
    engine.finish_load(0, engine.routing_state())
