"""Where a run stands when a life of it begins: new, begun from other weights, to be resumed, or finished."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.start import Chosen, Origin, choose_origin, chosen_checkpoints, fill_from
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.run import RunConfig
from rxt_dist.data.sampler import DataState
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import WEIGHT, Engine
from rxt_dist.errors import CheckpointError
from rxt_dist.files import lasting_errors
from rxt_dist.model.init import InitialWeights
from rxt_dist.stages.base import DataSource


@dataclass(frozen=True)
class Position:
    """How far training is: steps taken, updates applied, rows delivered, tokens that were not padding.

    jumps: windows of rows [first, end) that training passes over, which count as delivered all the same.
    """

    step: int = 0
    applied: int = 0
    row: int = 0
    tokens_seen: int = 0
    skipped_in_a_row: int = 0
    jumps: tuple[tuple[int, int], ...] = ()


def set_aside_after(store: CheckpointStore, step: int, metrics: Path) -> Path | None:
    """Set aside every checkpoint later than `step`, with a copy of the metrics; rank 0, which holds the run.

    Returns where they are; None where nothing is later.
    """
    if not any(other > step for other in store.steps()):
        return None
    with lasting_errors(store.directory):
        return store.set_aside(step, beside=[metrics] if metrics.exists() else [])


def position_of(checkpoint: Checkpoint, data: DataSource) -> Position:
    """The position of a checkpoint.

    Raises:
        DataError: the data is not what it was trained on.
        CheckpointError: the position was written by another version.
    """
    DataState.from_dict(checkpoint.meta["data"]).check(data.order, data.digests)
    try:
        saved = Position(**checkpoint.meta["position"])
        # A streak of skipped updates ends with a life: whoever starts the next one may have turned the rate.
        return replace(saved, skipped_in_a_row=0, jumps=tuple((first, end) for first, end in saved.jumps))
    except TypeError as error:
        raise CheckpointError(
            f"The position in {checkpoint.path} is {checkpoint.meta['position']}, which this version of the program "
            "does not understand. Resume with the version named in its manifest."
        ) from error


@dataclass(frozen=True)
class Beginning:
    """Where the weights of a life come from.

    origin: of those of the run that did not begin afresh; None: all did. remarks: what there is to say about it.
    chosen: the checkpoints of other runs from which this life takes some.
    """

    origin: dict[str, Any] | None = None
    remarks: tuple[str, ...] = ()
    chosen: Chosen = ()


def choose_beginning(config: RunConfig, checkpoint: Checkpoint | None, group: Collectives) -> Beginning:
    """Where the weights will come from, verified; of a life that resumes, where its run once began."""
    if checkpoint is not None:
        return Beginning(checkpoint.meta.get("origin"))
    start = config.start
    if start is None or not start.origins:
        return Beginning()
    remarks: list[str] = []
    found = group.together(lambda: choose_origin(start, remarks.append).to_dict() if group.rank == 0 else None)[0]
    origin = Origin.from_dict(found)
    taken = "; ".join(str(one) for one in origin.all)
    fresh = [part for part in config.stage.parts() if part not in start.taken]
    remarks.append(f"weights: {taken}; afresh: {', '.join(fresh) or 'nothing'}")
    return Beginning(origin.to_dict(), tuple(remarks), chosen_checkpoints(start, origin))


def set_weights(
    engine: Engine, frozen: FrozenWeights, config: RunConfig, initial: InitialWeights, beginning: Beginning
) -> None:
    """Write the first weights of a run into an engine that has none: each rank those that it holds, as float32 where
    they are trained. All ranks together."""
    start = config.start
    taken = start.taken if start is not None else ()
    fragments = [*engine.fragments(owned=False), *engine.frozen_fragments(), *frozen.fragments()]
    runs = [(piece.name, piece.start, piece.tensors[WEIGHT]) for piece in fragments]
    initial.fill(run for run in runs if run[0].split(".")[0] not in taken)
    if start is not None and taken:
        theirs = [run for run in runs if run[0].split(".")[0] in taken]
        engine.ranks.together(lambda: fill_from(start, beginning.chosen, theirs))
    engine.finish_load(0, engine.routing_state())
