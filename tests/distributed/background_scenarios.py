"""What gloo ranks do in the tests of saves in the background."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from damage import flip_a_bit
from harness import RankContext
from resume_scenarios import _engine, _steps
from scenarios import release

from rxt_dist.checkpoint import writing
from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.host_copy import HostCopy
from rxt_dist.checkpoint.state import save_state, state_checksum
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.checkpoint.verified import load_verified
from rxt_dist.engine.build import joined_ranks
from rxt_dist.engine.interface import Engine


def save_both_ways(context: RankContext, directory: str, topology: dict[str, Any]) -> dict[str, Any]:
    """Save a state while waiting, and in the background while it trains on; then load what the background wrote, after
    a copy of the other one that is damaged."""
    with joined_ranks(torch.device("cpu"), plain=False):
        engine, frozen, stage, config = _engine(context, topology)
        _steps(context, engine, stage, config, range(2))
        save_state(engine, frozen, CheckpointStore(Path(directory) / "waited", 2), 2, {"note": "test"})
        saved = state_checksum(engine, frozen)
        store = CheckpointStore(Path(directory) / "background", 2)
        saves = BackgroundSaves(engine, frozen, store)
        copy = HostCopy._copy
        # For longer than the forward and backward pass that go on beside it.
        HostCopy._copy = lambda *arguments: (time.sleep(0.3), copy(*arguments))  # type: ignore[method-assign]
        saves.start(2, {"note": "test"})
        _steps(context, engine, stage, config, range(2, 4), saves.before_update)
        HostCopy._copy = copy  # type: ignore[method-assign]
        outcome = saves.wait()
        engine.ranks.any(False)  # Rank 0 has committed.
        changed = state_checksum(engine, frozen)
        damaged = _damaged_copy(context, engine, Path(directory))
        rejected = load_verified(engine, frozen, damaged, damaged.read(2), 2)
        assert load_verified(engine, frozen, store, store.read(2), 2) == []
        result = {"saved": saved, "changed": changed, "loaded": state_checksum(engine, frozen), "rejected": rejected}
        saves.close(0)
        release(engine)
    return result | {"error": str(outcome.error), "bytes": outcome.bytes}


def _damaged_copy(context: RankContext, engine: Engine, folder: Path) -> CheckpointStore:
    """What was saved while waiting, with one other bit in a weight or moment that the last rank wrote."""
    if context.rank == 0:
        shutil.copytree(folder / "waited", folder / "damaged")
        flip_a_bit(max((folder / "damaged").glob("*/rank-*")), -7)
    engine.ranks.any(False)
    return CheckpointStore(folder / "damaged", 2)


def one_rank_fails(context: RankContext, directory: str) -> dict[str, Any]:
    """The disk of rank 1 is full at the first save; then the folder of rank 0 cannot be made; then all is well."""
    with joined_ranks(torch.device("cpu"), plain=False):
        engine, frozen, _, _ = _engine(context, {"zero": 1})
        store = CheckpointStore(Path(directory), 2)
        saves = BackgroundSaves(engine, frozen, store)
        real = writing.write_tensors
        told, left = [], []
        for step in (1, 2, 3):

            def write(*arguments: Any, step: int = step) -> str:
                if (step, context.rank) == (1, 1):
                    raise OSError(28, "No space left on device")
                return real(*arguments)

            def begin(number: int, step: int = step) -> Path:
                if step == 2:
                    raise PermissionError(13, "Permission denied")
                return CheckpointStore.begin(store, number)

            writing.write_tensors = write
            store.begin = begin  # type: ignore[method-assign]
            saves.start(step, {})
            outcome = saves.wait()
            engine.ranks.any(False)
            told.append([type(outcome.error).__name__, str(outcome.error)])
            left.append(sorted(path.name for path in Path(directory).glob("step-*")))
            engine.ranks.any(False)
        release(engine)
    return {"told": told, "left": left}


def die_while_saving(context: RankContext, directory: str, at: str) -> None:
    """Save step 1; at step 2 rank 1 is gone in the middle of its part, and rank 0 gives the save up."""
    with joined_ranks(torch.device("cpu"), plain=False):
        engine, frozen, _, _ = _engine(context, {"zero": 1})
        store = CheckpointStore(Path(directory), 2)
        saves = BackgroundSaves(engine, frozen, store)
        saves.start(1, {})
        saves.wait()
        engine.ranks.any(False)
        if context.rank == 1:
            if at == "write":
                writing.write_tensors = lambda *_: os._exit(0)
            else:
                store.record = lambda *_: os._exit(0)  # type: ignore[method-assign]
        saves.start(2, {})
        saves.close(1.0)
        outcome = saves.outcome
        assert outcome is not None
        assert "given up" in str(outcome.error)
        os._exit(0)  # The process group has lost a rank.
