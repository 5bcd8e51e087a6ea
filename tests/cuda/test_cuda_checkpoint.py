"""Checkpoints between devices, and a resume on a device that is the same to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from place import DEVICE, DRY
from steps import engine_on, same_noise, train  # noqa: F401  (a fixture)

from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import load_state, save_state, state_checksum
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.model.init import initialise

CPU = torch.device("cpu")
SAVED_AT, STEPS = 3, 6
PLAIN: dict[str, Any] = {"engine": "plain", "zero": 0}
# On the CPU the others are tested with ranks (tests/distributed).
ENGINES = [PLAIN] if DRY else [PLAIN, {"zero": 1}, {"zero": 3}]


def name_of(wanted: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in wanted.items())


def save(folder: Path, device: torch.device, beside: bool = False, **changes: Any) -> tuple[Any, int]:
    """Train to SAVED_AT, save, and go on, after the save or beside it: what the last steps gave, and the checksum of
    what was saved."""
    with engine_on(device, **changes) as (engine, stage):
        train(engine, stage, range(SAVED_AT))
        frozen, store = FrozenWeights(stage.model, engine.ranks), CheckpointStore(folder, 2)
        checksum = state_checksum(engine, frozen)
        if not beside:
            save_state(engine, frozen, store, SAVED_AT, {})
            return train(engine, stage, range(SAVED_AT, STEPS)), checksum
        saves = BackgroundSaves(engine, frozen, store)
        slow_down(saves)
        saves.start(SAVED_AT, {})
        given = train(engine, stage, range(SAVED_AT, STEPS), before_update=saves.before_update)
        assert saves.wait().error is None
        assert device.type == "cpu" or saves.device_wait() > 0.1
        saves.close(0)
        return given, checksum


def slow_down(saves: BackgroundSaves) -> None:
    """The copy of the next save takes longer than the passes beside it: an update that did not wait would be in it."""
    stream = saves._copy._stream
    if stream is not None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000_000)  # Cycles: about a second.


def resume(folder: Path, device: torch.device, **changes: Any) -> tuple[Any, int]:
    """Load into other weights and go on: what the last steps gave, and the checksum of what was loaded."""
    checkpoint = CheckpointStore(folder, 2).latest_valid(print)
    assert checkpoint is not None
    with engine_on(device, **changes) as (engine, stage):
        frozen = FrozenWeights(stage.model, engine.ranks)
        load_state(engine, frozen, checkpoint, SAVED_AT)
        checksum = state_checksum(engine, frozen)
        return train(engine, stage, range(SAVED_AT, STEPS)), checksum


@pytest.fixture
def deterministic() -> Any:
    """Flash attention's backward pass adds in the order in which its blocks end, unless it is asked not to."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _other_weights_after_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every stage begins with weights of its own, so that what is equal afterwards was loaded."""
    import tiny

    seeds = iter(range(100))
    monkeypatch.setattr(tiny, "initialise", lambda model, _: initialise(model, next(seeds)))


@pytest.mark.usefixtures("same_noise", "one_rank")
@pytest.mark.parametrize("wanted", ENGINES, ids=name_of)
@pytest.mark.parametrize("way", ["to the CPU", "from the CPU"])
def test_a_checkpoint_moves_between_devices(way: str, wanted: dict[str, Any], tmp_path: Path) -> None:
    places = (DEVICE, CPU) if way == "to the CPU" else (CPU, DEVICE)
    # DeepSpeed has one accelerator a process: on the CPU the plain engine reads and writes.
    changes = [wanted if place == DEVICE else PLAIN for place in places]
    expected, saved = save(tmp_path, places[0], **changes[0])
    actual, loaded = resume(tmp_path, places[1], **changes[1])
    assert loaded == saved, "the state is the same to the bit"
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-3)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=5e-3)


@pytest.mark.usefixtures("one_rank", "deterministic")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", ENGINES, ids=name_of)
def test_a_resume_is_the_same_to_the_bit(wanted: dict[str, Any], precision: str, tmp_path: Path) -> None:
    expected, saved = save(tmp_path, DEVICE, beside=True, precision=precision, **wanted)
    actual, loaded = resume(tmp_path, DEVICE, precision=precision, **wanted)
    assert loaded == saved
    for mine, theirs in zip(actual, expected, strict=True):
        assert (mine.losses, mine.grad_norm) == (theirs.losses, theirs.grad_norm)
        assert torch.equal(mine.experts_ME, theirs.experts_ME)
