"""Going back: which checkpoint a run that went astray goes on from, and which rows it passes over from there.

`jumps.json` in the run directory is written before anything is loaded: a kill in between loses no window. It also says
which checkpoints are of the history that was given up: those after the step that was gone back to, made without the
window. They are set aside, never deleted, and nothing else is. The file has a digest: one altered digit would give up
others.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rxt_dist.checkpoint.state import load_state
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError, DivergedError
from rxt_dist.files import lasting_errors, write_atomic, write_json_atomic
from rxt_dist.train.candidates import newest_sound
from rxt_dist.train.health import Health
from rxt_dist.train.resume import Position, position_of, set_aside_after
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
    if not path.exists():
        return []
    try:
        known = json.loads(path.read_bytes())
        if known["digest"] != _digest(known["jumps"]):
            raise ValueError("its own sha256 differs")
        return [Jump(**jump) for jump in known["jumps"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}), and says which rows this run passes over. Restore it from a copy, or remove "
            f"it: the run then goes on with the windows that its checkpoint knows."
        ) from error


def write_jumps(path: Path, jumps: Sequence[Jump]) -> None:
    """Write all rollbacks of a run, durably."""
    described = [asdict(jump) for jump in jumps]
    write_json_atomic(path, {"jumps": described, "digest": _digest(described)})


def keep_jumps(path: Path, windows: Sequence[Window]) -> list[Window]:
    """Take back every rollback but those with these windows; returns the windows of the others, which a copy keeps."""
    known = read_jumps(path)
    kept = [jump for jump in known if jump.window in windows]
    if len(kept) < len(known):
        until = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        write_atomic(path.with_name(f"jumps-until-{until}.json"), path.read_bytes())
        write_jumps(path, kept)
    return sorted({jump.window for jump in known} - set(windows))


def spans(windows: Sequence[Window]) -> str:
    """Windows for a person, those that touch as one."""
    joined: list[list[int]] = []
    for first, end in joined_windows(windows):
        if joined and first <= joined[-1][1]:
            joined[-1][1] = max(end, joined[-1][1])
        else:
            joined.append([first, end])
    return ", ".join(f"{first:,} to {end - 1:,}" for first, end in joined)


def _digest(described: Sequence[Mapping[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


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
    with training.watchdog.phase("load"):
        checkpoint, passed_over = newest_sound(ranks, training.store, up_to=streak.back_to)
        to_step = None if checkpoint is None else checkpoint.step
        jump = Jump(streak.row, position.row, to_step or 0, position.step, optimizer.lr, optimizer.clip, reason)
        decided = ranks.together(lambda: _decide(training, jump, to_step, streak.back_to) if ranks.rank == 0 else None)[
            0
        ]
        if checkpoint is None or decided["tries"] >= MOST_ROLLBACKS:
            raise DivergedError(_advice(training, jump, checkpoint, decided, passed_over))
        position_then = position_of(checkpoint, training.data)
        load_state(training.engine, training.frozen, checkpoint, position_then.applied)
    ranks.together(lambda: _record(training, jump, began))
    return checkpoint, replace(position_then, jumps=joined_windows(position_then.jumps, decided["windows"]))


def _decide(training: Training, jump: Jump, to_step: int | None, back_to: int) -> dict[str, Any]:
    """Note the jump, if it helps to try it, and set aside what may hold the spoilt weights; rank 0."""
    directory = training.directory
    directory.require_life()
    with lasting_errors(directory.path):
        jumps = read_jumps(directory.jumps)
        tries = sum((known.lr, known.clip) == (jump.lr, jump.clip) for known in jumps)
        if to_step is not None and tries < MOST_ROLLBACKS:
            jumps.append(jump)
            write_jumps(directory.jumps, jumps)
    # Without a checkpoint to go back to, those from before it all went wrong stay where they are, for a person.
    aside = set_aside_after(training.store, back_to if to_step is None else to_step, directory.metrics)
    vain = _in_vain(jump, jumps)
    before = min((known.to_step for known in vain), default=None)
    return {
        "tries": tries,
        "windows": [known.window for known in jumps],
        "aside": aside and aside.name,
        "in vain": [known.window for known in vain],
        "before": before if before in training.store.steps() else None,
    }


def _in_vain(jump: Jump, jumps: Sequence[Jump]) -> list[Jump]:
    """Rollbacks of the same trouble: with the same rate, one after another up to where this one begins. What was passed
    over long before has helped."""
    found: list[Jump] = []
    first = jump.first
    for known in reversed(jumps):
        if (known.lr, known.clip) != (jump.lr, jump.clip) or known.end < first or known == jump:
            break
        found.append(known)
        first = min(first, known.first)
    return found


def _record(training: Training, jump: Jump, began: float) -> None:
    """Drop the lines that come again, and say what happened; every rank, of which rank 0 writes."""
    with lasting_errors(training.directory.path):
        lost = training.reporter.go_back(jump.to_step)
    training.reporter.event(
        "rollback",
        step=jump.step,
        to_step=jump.to_step,
        rows=[jump.first, jump.end],
        reason=jump.reason,
        seconds=round(time.monotonic() - began, 3),
        **lost,
    )


def _advice(
    training: Training,
    jump: Jump,
    checkpoint: Checkpoint | None,
    decided: Mapping[str, Any],
    passed_over: Sequence[str],
) -> str:
    knobs = f"optimizer.lr={jump.lr:g} and optimizer.clip={jump.clip:g}"
    tried = f", also after going back {decided['tries']} times with {knobs}" if decided["tries"] else f" with {knobs}"
    aside = f" What was saved since is set aside in checkpoints/{decided['aside']}." if decided["aside"] else ""
    if checkpoint is not None:
        name = checkpoint.path.name
        goes_on = f"It goes on from {name}, the newest checkpoint from before it; `--from step-N` names an earlier one"
        if decided["in vain"]:
            rows = spans(decided["in vain"])
            goes_on += f". Rows {rows} stay passed over, which did not help"
            if decided["before"] is not None:
                goes_on += (
                    f"; `--from step-{decided['before']}` trains on them, and on all that was passed over later, again"
                )
    elif passed_over:
        goes_on = f"No checkpoint from before it could be gone back to: {' '.join(passed_over)}"
    else:
        goes_on = "No checkpoint is from before it, so that it begins anew"
    return (
        f"{jump.reason[:1].upper()}{jump.reason[1:]} up to step {jump.step}{tried}. Start the run again with a lower "
        f"optimizer.lr or optimizer.clip. {goes_on.removesuffix('.')}.{aside}"
    )


def given_up(step: int, meta: Mapping[str, Any], jumps: Sequence[Jump]) -> bool:
    """Whether a checkpoint is of a history that the run went back from."""
    windows = joined_windows(meta.get("position", {}).get("jumps", ()))
    return any(step > jump.to_step and jump.window not in windows for jump in jumps)


@dataclass(frozen=True)
class Past:
    """What `jumps.json` says of a run.

    windows: rows that it passes over. up_to: the last step whose checkpoint is of the present history, where there are
    some that are not; None: all are.
    """

    windows: tuple[Window, ...]
    up_to: int | None


def read_past(group: Collectives, store: CheckpointStore, path: Path) -> Past:
    """What a run has gone back from; all ranks together, at the start of a life. Nothing is changed.

    Raises:
        CheckpointError: `path` is damaged.
    """

    def read() -> list[Any]:
        with lasting_errors(path.parent):
            jumps = read_jumps(path)
        stale = []
        for step in store.steps() if jumps else ():
            with suppress(CheckpointError):  # Its manifest is damaged, so that no load takes it.
                stale += [step] if given_up(step, store.read(step).meta, jumps) else []
        # Nothing was made in the present history before they were looked for, so that they are the last.
        return [[jump.window for jump in jumps], min(stale) - 1 if stale else None]

    windows, up_to = group.together(lambda: read() if group.rank == 0 else None)[0]
    return Past(joined_windows(windows), up_to)
