"""Going back: which checkpoint a run that went astray goes on from, and which rows it passes over from there.

`jumps.json` in the run directory is written before anything is loaded: a kill in between loses no window. It also says
which checkpoints are of the history that was given up: those after the step that was gone back to, made without the
window. They are set aside, never deleted.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rxt_dist.checkpoint.state import load_state
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError, DivergedError
from rxt_dist.files import write_json_atomic
from rxt_dist.train.health import Health
from rxt_dist.train.resume import Position, position_of
from rxt_dist.train.training import Training

# With one learning rate and clip: data can spoil a run, but if passing over it twice did not help, it is not the data.
MOST_ROLLBACKS = 2

# Rows [first, end) that are passed over.
Window = tuple[int, int]


@dataclass(frozen=True)
class Jump:
    """One rollback: rows [first, end) are passed over from the checkpoint of `to_step` on.

    step: at which it was decided; lr, clip: with which; reason: for a person.
    """

    first: int
    end: int
    to_step: int
    step: int
    lr: float
    clip: float
    reason: str

    @property
    def window(self) -> Window:
        return self.first, self.end


def read_jumps(path: Path) -> list[Jump]:
    """All rollbacks of a run, in their order.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        return [Jump(**jump) for jump in json.loads(path.read_bytes())["jumps"]] if path.exists() else []
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), and says which rows this run passes over. Restore it from a copy, or remove "
            f"it: the run then goes on with the windows that its checkpoint knows."
        ) from error


def write_jumps(path: Path, jumps: Sequence[Jump]) -> None:
    """Write all rollbacks of a run, durably."""
    write_json_atomic(path, {"jumps": [asdict(jump) for jump in jumps]})


def joined_windows(*windows: Sequence[Window]) -> tuple[Window, ...]:
    """Every window once, by its first row."""
    return tuple(sorted({(int(first), int(end)) for some in windows for first, end in some}))


def is_jumped(first: int, end: int, windows: Sequence[Window]) -> bool:
    """Whether rows [first, end) touch a window."""
    return any(first < window_end and window_first < end for window_first, window_end in windows)


def go_back(training: Training, position: Position, health: Health, reason: str) -> tuple[Checkpoint, Position]:
    """Load the newest checkpoint from before what went wrong, and pass over the rows from there on to `position`.

    All ranks together. Returns the checkpoint, and where the run stands now.

    Raises:
        DivergedError: there is no such checkpoint, or going back has not helped so far.
    """
    began, streak = time.monotonic(), health.streak
    assert streak is not None, "only a streak makes a run go back"
    ranks, optimizer = training.engine.ranks, training.config.optimizer
    file, store = training.directory.jumps, training.store

    def decide() -> dict[str, Any]:
        jumps = read_jumps(file)
        to_step = target(store, streak.back_to)
        tries = sum((jump.lr, jump.clip) == (optimizer.lr, optimizer.clip) for jump in jumps)
        if to_step is not None and tries < MOST_ROLLBACKS:
            jump = Jump(streak.row, position.row, to_step, position.step, optimizer.lr, optimizer.clip, reason)
            jumps.append(jump)
            write_jumps(file, jumps)
            tries = -1
        # What was made since may hold the spoilt weights.
        later = any(step > (to_step or 0) for step in store.steps())
        aside = store.set_aside(to_step or 0).name if later else None
        windows = [jump.window for jump in jumps]
        return {"to_step": to_step, "tries": tries, "windows": windows, "aside": aside}

    with training.watchdog.phase("load"):
        decided = ranks.together(lambda: decide() if ranks.rank == 0 else None)[0]
        if decided["tries"] >= 0:
            raise DivergedError(_advice(training, position, reason, decided))
        checkpoint = store.read(decided["to_step"])
        position_then = position_of(checkpoint, training.data)
        load_state(training.engine, training.frozen, checkpoint, position_then.applied)
    lost = training.reporter.go_back(checkpoint.step)
    training.reporter.event(
        "rollback",
        step=position.step,
        to_step=checkpoint.step,
        rows=[streak.row, position.row],
        reason=reason,
        seconds=round(time.monotonic() - began, 3),
        **lost,
    )
    jumps = joined_windows(position_then.jumps, decided["windows"])
    return checkpoint, replace(position_then, jumps=jumps)


def _advice(training: Training, position: Position, reason: str, decided: Mapping[str, Any]) -> str:
    optimizer = training.config.optimizer
    knobs = f"optimizer.lr={optimizer.lr:g} and optimizer.clip={optimizer.clip:g}"
    tried = f", also after going back {decided['tries']} times with {knobs}" if decided["tries"] else f" with {knobs}"
    aside = f" What was saved since is set aside in checkpoints/{decided['aside']}." if decided["aside"] else ""
    if decided["to_step"] is None:
        goes_on = "No checkpoint is from before it, so that it begins anew"
    else:
        name = training.store.folder(decided["to_step"]).name
        goes_on = f"It goes on from {name}, the newest checkpoint from before it; `--from step-N` names an earlier one"
    return (
        f"{reason[:1].upper()}{reason[1:]} up to step {position.step}{tried}. Start the run again with a lower "
        f"optimizer.lr or optimizer.clip. {goes_on}.{aside}"
    )


def given_up(step: int, meta: Mapping[str, Any], jumps: Sequence[Jump]) -> bool:
    """Whether a checkpoint is of a history that the run went back from."""
    windows = joined_windows(meta.get("position", {}).get("jumps", ()))
    return any(step > jump.to_step and jump.window not in windows for jump in jumps)


def known_windows(group: Collectives, store: CheckpointStore, path: Path) -> tuple[Window, ...]:
    """The windows of `jumps.json`; checkpoints of histories that were given up are set aside. All ranks together, at
    the start of a life."""

    def read() -> list[Window]:
        jumps = read_jumps(path)
        sound = [info.step for info in store.list() if info.committed and not info.problem] if jumps else []
        stale = [step for step in sound if given_up(step, store.read(step).meta, jumps)]
        if stale:
            # Nothing was made in the present history before they were looked for, so that they are the last.
            store.set_aside(min(stale) - 1)
        return [jump.window for jump in jumps]

    return joined_windows(group.together(lambda: read() if group.rank == 0 else None)[0])


def target(store: CheckpointStore, back_to: int) -> int | None:
    """The newest valid checkpoint of `back_to` or before that is not suspect; rank 0."""
    for step in reversed(store.steps()):
        if step <= back_to and not store.verify(step) and not store.read(step).meta.get("suspect"):
            return step
    return None
