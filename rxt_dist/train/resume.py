"""Where a run stands when a life of it begins: new, begun from other weights, to be resumed, or finished."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.start import Chosen, Origin, choose_origin, chosen_checkpoints, fill_from
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.checkpoint.verified import verify_together
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


def find_checkpoint(
    group: Collectives, store: CheckpointStore, up_to: int | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint that a life goes on from, if there is any, and what there is to say; all ranks together.

    Args:
        up_to: the last step that is looked at; None: all are.

    Raises:
        CheckpointError: there are checkpoints, but none is valid. Starting again from nothing would destroy them and
            the run's history, when perhaps a disk is only not mounted.
    """

    def look() -> tuple[list[int], list[str]]:
        said: list[str] = []
        store.check_pointer(said.append)
        return list(store.steps()), said

    steps, remarks = group.together(lambda: look() if group.rank == 0 else None)[0]
    given_up = [step for step in steps if up_to is not None and step > up_to]
    remarks += [f"Checkpoint {store.folder(step)} is of a history that was given up." for step in given_up]
    checkpoint, rejected = newest_valid(group, store, up_to=up_to)
    remarks += rejected
    if checkpoint is None and steps:
        raise CheckpointError(
            f"No checkpoint in {store.directory} is valid, and this run will not start again from nothing over "
            f"them. {' '.join(remarks)} Restore the files, or remove the folder to start over."
        )
    if checkpoint is not None and checkpoint.is_suspect:
        remarks.append(f"Checkpoint {checkpoint.path} was made while losses were suspect.")
    return checkpoint, remarks


def newest_valid(
    group: Collectives, store: CheckpointStore, *, up_to: int | None, suspects: bool = True
) -> tuple[Checkpoint | None, list[str]]:
    """The newest valid checkpoint, and why later ones were passed over; all ranks together.

    Args:
        up_to: the last step that is looked at; None: all are.
        suspects: whether one may be taken that was made while losses were suspect.
    """
    steps = group.together(lambda: list(store.steps()) if group.rank == 0 else None)[0]
    remarks = []
    for step in reversed([step for step in steps if up_to is None or step <= up_to]):
        checkpoint, problems = verify_together(group, store, step)
        if checkpoint is None:
            remarks.append(f"Checkpoint {store.folder(step)} is rejected: {'; '.join(problems)}.")
        elif not suspects and checkpoint.is_suspect:
            remarks.append(f"Checkpoint {store.folder(step)} was made while losses were suspect.")
        else:
            return checkpoint, remarks
    return None, remarks


def named_checkpoint(
    group: Collectives, store: CheckpointStore, step: int, up_to: int | None = None
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint of `step`, verified; all ranks together.

    Args:
        up_to: the last step whose checkpoint is of the present history; None: all are.

    Raises:
        CheckpointError: there is none of this step, or it is damaged, or of a history that was given up.
    """
    if up_to is not None and step > up_to:
        raise CheckpointError(
            f"--from names step {step}, which is of a history that this run has gone back from (see jumps.json). Name "
            f"an earlier one, of step {up_to} at most."
        )
    steps = group.together(lambda: list(store.steps()) if group.rank == 0 else None)[0]
    if step not in steps:
        raise CheckpointError(
            f"--from names step {step}, of which {store.directory} has no committed checkpoint; its steps are: "
            f"{', '.join(map(str, steps)) or 'none'}."
        )
    checkpoint, problems = verify_together(group, store, step)
    if checkpoint is None:
        raise CheckpointError(f"Checkpoint {store.folder(step)} is damaged: {'; '.join(problems)}. Name another step.")
    return checkpoint, []


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
