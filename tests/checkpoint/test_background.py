"""A save in the background, of one process: equal to one that training waited for, whatever training does meanwhile."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rxt_dist.checkpoint import background, checksum, writing
from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import save_state, state_checksum
from rxt_dist.checkpoint.store import MANIFEST, CheckpointStore
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Fragment
from rxt_dist.errors import CheckpointError, DiskError

CPU = torch.device("cpu")


class Holder:
    """An engine with these parameters, each with two moments."""

    def __init__(self, *sizes: int) -> None:
        self.ranks, self.device = Collectives(CPU), CPU
        generator = torch.Generator().manual_seed(1)
        self.held = [
            Fragment(
                f"p{number}", 3, {kind: torch.randn(size, generator=generator) for kind in ("weight", "exp_avg", "e2")}
            )
            for number, size in enumerate(sizes)
        ]
        self.counts = torch.arange(4)

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        assert owned
        yield from self.held

    def routing_state(self) -> dict[str, torch.Tensor]:
        return {"expert_counts": self.counts}

    def train(self) -> None:
        """Change everything in place, as an optimizer does."""
        for fragment in self.held:
            for tensor in fragment.tensors.values():
                tensor.mul_(-2)
        self.counts += 1


@pytest.fixture
def engine() -> Any:
    return Holder(5, 1000, 7)


@pytest.fixture
def frozen(engine: Any) -> FrozenWeights:
    model = torch.nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    return FrozenWeights(model, engine.ranks)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST}


def stopped(monkeypatch: pytest.MonkeyPatch, name: str) -> threading.Event:
    """A save stands still when it reaches `name` of the store, until the event is set."""
    event, real = threading.Event(), getattr(CheckpointStore, name)

    def wait(*arguments: Any) -> Any:
        assert event.wait(10)
        return real(*arguments)

    monkeypatch.setattr(CheckpointStore, name, wait)
    return event


def test_it_is_bit_equal_to_a_save_that_training_waits_for(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on before a byte is written; several files, and pieces of one that are checksummed in blocks."""
    monkeypatch.setattr(writing, "_FILE_BYTES", 4096)
    monkeypatch.setattr(checksum, "_BLOCK_ELEMENTS", 64)
    waited = save_state(engine, frozen, CheckpointStore(tmp_path / "waited", 2), 1, {"tokens": 7})
    go_on = stopped(monkeypatch, "begin")
    store = CheckpointStore(tmp_path / "background", 2)
    saves = BackgroundSaves(engine, frozen, store)
    for step in (1, 2):  # The second one writes from the same memory.
        expected = state_checksum(engine, frozen)
        saves.start(step, {"tokens": 7})
        assert saves.outcome is None
        saves.before_update()
        engine.train()
        go_on.set()
        outcome = saves.wait()
        assert (outcome.step, outcome.error) == (step, None)
        assert outcome.bytes == sum(file.bytes for file in store.read(step).files)
        assert store.read(step).meta == {"tokens": 7, "state_checksum": expected}
        assert store.verify(step) == []
        go_on.clear()
    assert len(contents(waited)) > 3
    assert contents(store.folder(1)) == contents(waited)
    assert store.read(1).meta == CheckpointStore(tmp_path / "waited", 2).read(1).meta
    saves.close(0)


def test_what_writes_makes_way_for_training(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, found = writing.write_tensors, []

    def write(*arguments: Any) -> str:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return str(real(*arguments))

    monkeypatch.setattr(writing, "write_tensors", write)
    saves = BackgroundSaves(engine, frozen, CheckpointStore(tmp_path, 2))
    saves.start(1, {})
    assert saves.wait().error is None
    own = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    assert len(found) == 2
    assert all(nice > own for nice in found)


@pytest.mark.parametrize(("there", "used"), [(1, 1), (2, 1), (3, 1), (4, 2), (8, 4), (128, 4)])
def test_half_of_the_processors_are_left_to_training(there: int, used: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "processors", lambda: there)
    assert background._threads() == used


def test_no_save_takes_the_memory_of_one_that_is_being_written(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = stopped(monkeypatch, "begin")
    store = CheckpointStore(tmp_path, 2)
    saves = BackgroundSaves(engine, frozen, store)
    saves.start(1, {})
    saves.before_update()
    engine.train()
    with pytest.raises(AssertionError, match="two saves at once"):
        saves.start(2, {})
    go_on.set()
    assert saves.wait().error is None
    assert store.verify(1) == []


def test_a_full_disk_is_an_outcome_and_leaves_room(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, 2)
    saves = BackgroundSaves(engine, frozen, store)

    def full(*_: Any) -> str:
        (store.unfinished_folder(1) / "half").write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing, "write_tensors", full)
        saves.start(1, {})
        outcome = saves.wait()
    assert isinstance(outcome.error, DiskError)
    assert "No space left on device. Earlier" in str(outcome.error)
    assert list(tmp_path.iterdir()) == []
    saves.start(2, {})
    assert saves.wait().error is None
    assert list(store.steps()) == [2]


def test_a_fault_of_the_program_is_an_outcome_too(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CheckpointStore, "commit", lambda *_: 1 / 0)
    saves = BackgroundSaves(engine, frozen, CheckpointStore(tmp_path, 2))
    saves.start(1, {})
    outcome = saves.wait()
    assert isinstance(outcome.error, CheckpointError)
    assert "ZeroDivisionError" in str(outcome.error)


def test_the_end_of_a_life_waits_for_what_is_nearly_there(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = stopped(monkeypatch, "commit")
    store = CheckpointStore(tmp_path, 2)
    saves = BackgroundSaves(engine, frozen, store)
    saves.start(1, {})
    threading.Timer(0.2, go_on.set).start()
    saves.close(10)
    assert list(store.steps()) == [1]


def test_the_end_of_a_life_does_not_wait_for_ever(
    engine: Any, frozen: FrozenWeights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_POLL", background.timedelta(seconds=0.01))
    go_on = stopped(monkeypatch, "begin")
    saves = BackgroundSaves(engine, frozen, CheckpointStore(tmp_path, 2))
    saves.start(1, {})
    started = time.monotonic()
    saves.close(0.1)
    assert time.monotonic() - started < 5
    go_on.set()
