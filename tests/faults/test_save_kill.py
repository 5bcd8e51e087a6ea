"""SIGKILL at each phase of a save: the next life finds the last commit, and ends as if nothing had happened."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rxt_dist.checkpoint import host_copy, store, uncached
from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Fragment

pytestmark = pytest.mark.faults

CPU = torch.device("cpu")
LAST, KILLED_AT, SIZE = 6, 4, 1000
# Where a save stands still: (module or class, function, which call of this save, before or after it); and whether the
# checkpoint is committed by then.
PHASES = {
    "copy": (host_copy.np, "copyto", 1, "after", False),
    "a file of its size without content": (uncached.os, "ftruncate", 1, "after", False),
    "write": (uncached.os, "write", 1, "after", False),
    "fsync of a file": (uncached.os, "fsync", 1, "before", False),
    "record": (CheckpointStore, "record", 1, "after", False),
    "before the manifest": (store, "write_json_atomic", 1, "before", False),
    "after the manifest": (store, "write_json_atomic", 1, "after", False),
    "before the rename": (store.os, "rename", 1, "before", False),
    "after the rename": (store.os, "rename", 1, "after", True),
    "latest": (store, "write_atomic", 1, "before", True),
    "prune": (store.shutil, "rmtree", 1, "before", True),
}


class Training:
    """An engine whose every step changes its weights and moments in place, by what they were."""

    def __init__(self) -> None:
        self.ranks, self.device, self.step = Collectives(CPU), CPU, 0
        generator = torch.Generator().manual_seed(3)
        self.tensors = {kind: torch.randn(SIZE, generator=generator) for kind in ("weight", "exp_avg", "exp_avg_sq")}

    def train(self) -> None:
        self.step += 1
        for tensor in self.tensors.values():
            tensor.mul_(0.9).add_(self.step)

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        yield Fragment("p", 0, self.tensors)

    def routing_state(self) -> dict[str, torch.Tensor]:
        return {"expert_counts": torch.tensor([self.step])}


def live(directory: Path, phase: str = "", reached: int = -1) -> Training:
    """A life from the newest checkpoint to the last step; it stands still in `phase` of the save of KILLED_AT."""
    training: Any = Training()
    checkpoints = CheckpointStore(directory, 2)
    newest = checkpoints.latest_valid(pytest.fail)
    if newest is not None:
        pieces = SavedPieces(newest)
        for kind, tensor in training.tensors.items():
            pieces.fill(kind, "p", 0, tensor)
        training.step = newest.meta["step"]
    saves = BackgroundSaves(training, FrozenWeights(torch.nn.Module(), training.ranks), checkpoints)
    while training.step < LAST:
        training.train()
        if training.step == KILLED_AT and phase:
            stand_still(phase, reached)
        saves.start(training.step, {"step": training.step})
        assert saves.wait().error is None
    return training


def stand_still(phase: str, reached: int) -> None:
    uncached._BLOCK_BYTES = 1 << 12  # A file then takes several writes.
    place, name, call, side, _ = PHASES[phase]
    real, calls = getattr(place, name), []

    def function(*arguments: Any, **others: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            result = real(*arguments, **others) if side == "after" else None
            os.write(reached, b"x")
            time.sleep(60)
            return result
        return real(*arguments, **others)

    setattr(place, name, function)


def killed_in(directory: Path, phase: str) -> None:
    """A life in a process of its own, killed when it stands still."""
    hears, tells = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            live(directory, phase, tells)
        finally:
            os._exit(1)
    os.close(tells)
    ready, _, _ = select.select([hears], [], [], 15)
    said = os.read(hears, 1) if ready else b""
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(hears)
    assert said == b"x", f"the save did not come to '{phase}'"


@pytest.mark.parametrize("phase", PHASES)
def test_a_kill_in_any_phase_loses_nothing_committed(phase: str, tmp_path: Path) -> None:
    killed_in(tmp_path, phase)
    newest = CheckpointStore(tmp_path, 2).latest_valid(lambda _: None)
    assert newest is not None
    assert newest.step == (KILLED_AT if PHASES[phase][4] else KILLED_AT - 1)
    ended, undisturbed = live(tmp_path), live(tmp_path / "undisturbed")
    for kind, tensor in ended.tensors.items():
        assert torch.equal(tensor, undisturbed.tensors[kind])
    checkpoints = CheckpointStore(tmp_path, 2)
    assert list(checkpoints.steps()) == [LAST - 1, LAST]
    assert checkpoints.verify(LAST) == checkpoints.verify(LAST - 1) == []
    assert {path.name for path in tmp_path.iterdir()} == {
        "latest", "undisturbed", f"step-{LAST:08d}", f"step-{LAST - 1:08d}",
    }  # fmt: skip
