"""When a life saves, what it says of it, and what it does when a save fails; without an engine."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rxt_dist.checkpoint import writing
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.run import CheckpointConfig
from rxt_dist.data.sampler import DataState
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Fragment
from rxt_dist.errors import DiskError
from rxt_dist.train import saving
from rxt_dist.train.evaluate import Evaluation
from rxt_dist.train.resume import Position
from rxt_dist.train.saving import Saver
from rxt_dist.train.training import Training

CPU = torch.device("cpu")
ROW_TOKENS = 100


class Engine:
    """Holds one parameter."""

    def __init__(self) -> None:
        self.ranks, self.device = Collectives(CPU), CPU
        self.weight = torch.arange(8.0)

    def fragments(self, *, owned: bool) -> Any:
        yield Fragment("p", 0, {"weight": self.weight})

    def routing_state(self) -> dict[str, torch.Tensor]:
        return {}


class Life:
    """A saver with what it works with, a clock that stands still, and a disk that may be full."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.now, self.full = 1000.0, False
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self.pass_time)
        monkeypatch.setattr(saving, "time", clock)
        monkeypatch.setattr(saving, "measure_probe", lambda *_: {"loss": math.nan})
        monkeypatch.setattr(DataState, "at", lambda *_: SimpleNamespace(to_dict=dict))
        real = writing.write_tensors
        monkeypatch.setattr(writing, "write_tensors", lambda *arguments: self.write(real, *arguments))
        engine: Any = Engine()
        self.store = CheckpointStore(folder, 2)
        self.training = Training(
            config=SimpleNamespace(checkpoint=CheckpointConfig(**({"every_tokens": 1000} | config))),  # type: ignore[arg-type]
            engine=engine,
            stage=None,  # type: ignore[arg-type]
            frozen=FrozenWeights(torch.nn.Module(), engine.ranks),
            data=SimpleNamespace(row_tokens=ROW_TOKENS, order=None, digests=()),  # type: ignore[arg-type]
            store=self.store,
            stop=None,  # type: ignore[arg-type]
            reporter=SimpleNamespace(event=lambda kind, **fields: self.events.append((kind, fields))),  # type: ignore[arg-type]
            identity={"run_id": "1"},
            directory=None,  # type: ignore[arg-type]
            watchdog=None,  # type: ignore[arg-type]
        )
        self.saver = Saver(self.training, Position())

    def write(self, real: Any, *arguments: Any) -> str:
        if self.full:
            raise OSError(28, "No space left on device")
        return str(real(*arguments))

    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    def due(self, first: int, second: int) -> bool:
        return self.saver.due(Position(row=first), Position(row=second))


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Life:
    return Life(tmp_path, monkeypatch)


def at(step: int) -> Position:
    return Position(step=step, row=step)


def test_it_is_due_by_tokens(life: Life) -> None:
    assert [life.due(row, row + 1) for row in (0, 8, 9, 10, 19)] == [False, False, True, False, True]
    assert life.due(3, 25)


def test_it_is_due_by_minutes_since_the_last_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path, monkeypatch, every_minutes=2)
    life.pass_time(119)
    assert not life.due(1, 2)
    life.pass_time(1)
    assert life.due(1, 2)
    life.saver.save(at(2), wait=False)
    life.saver.settle()
    assert not life.due(2, 3)
    life.pass_time(120)
    assert life.due(2, 3)


def test_a_save_is_told_when_it_is_committed(life: Life) -> None:
    life.saver.save(at(1), wait=False)
    life.saver.settle()
    ((kind, fields),) = life.events
    assert kind == "save"
    assert (fields["step"], fields["path"]) == (1, "step-00000001")
    assert fields["bytes"] == sum(file.bytes for file in life.store.read(1).files)
    assert fields.keys() == {"step", "path", "bytes", "seconds", "stall_s", "bytes_per_s"}
    meta = life.store.read(1).meta
    assert (meta["tokens"], meta["position"]["step"], meta["run_id"]) == (100, 1, "1")
    assert (meta["probe"], meta["evaluation"], meta["suspect"]) == (None, None, False)


def test_what_host_and_device_waited_for_a_copy_is_stall(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving.BackgroundSaves, "before_update", lambda _: life.pass_time(0.5))
    monkeypatch.setattr(saving.BackgroundSaves, "device_wait", lambda _: 2.0)
    life.saver.save(at(1), wait=False)
    life.saver.before_update()
    life.saver.settle()
    assert life.events[0][1]["stall_s"] == 2.5


def test_a_step_is_saved_once(life: Life) -> None:
    for wait in (False, True, False):
        life.saver.save(at(1), wait=wait)
    assert life.kinds() == ["save"]
    life.saver.save(at(2), wait=True)
    life.saver.save(at(2), wait=True)
    assert life.kinds() == ["save", "save"]


def test_a_failed_save_is_told_and_tried_again_after_a_minute(life: Life) -> None:
    life.full = True
    life.saver.save(at(1), wait=False)
    life.saver.settle()
    ((kind, fields),) = life.events
    assert (kind, fields["step"], fields["retry_s"]) == ("save_failed", 1, 60.0)
    assert "No space left on device" in fields["error"]
    life.pass_time(59)
    assert not life.due(2, 3)
    life.pass_time(1)
    assert life.due(2, 3)
    life.full = False
    life.saver.save(at(3), wait=False)
    life.saver.settle()
    assert not life.due(3, 4)
    assert life.kinds() == ["save_failed", "save"]
    assert list(life.store.steps()) == [3]


def test_a_failure_is_told_at_the_next_step(life: Life) -> None:
    life.full = True
    life.saver.save(at(1), wait=False)
    assert life.saver._background is not None
    assert life.saver._background._thread is not None
    life.saver._background._thread.join()
    assert not life.due(1, 2)
    assert life.kinds() == ["save_failed"]


def test_the_last_save_takes_the_place_of_one_that_failed(life: Life) -> None:
    life.full = True
    life.saver.save(at(1), wait=False)
    life.saver._background._thread.join()  # type: ignore[union-attr]
    life.full = False
    life.saver.save(at(1), wait=True)
    assert life.kinds() == ["save_failed", "save"]
    assert list(life.store.steps()) == [1]


def test_a_save_that_must_not_fail_is_tried_three_times(life: Life) -> None:
    life.full = True
    with pytest.raises(DiskError):
        life.saver.save(at(1), wait=True)
    assert [(kind, fields["retry_s"]) for kind, fields in life.events] == [("save_failed", 1.0), ("save_failed", 5.0)]
    assert life.now == 1006


def test_room_that_is_made_meanwhile_is_used(life: Life, monkeypatch: pytest.MonkeyPatch) -> None:
    life.full = True

    def make_room(_: float) -> None:
        life.full = False

    monkeypatch.setattr(saving.time, "sleep", make_room)
    life.saver.save(at(1), wait=True)
    assert life.kinds() == ["save_failed", "save"]


def evaluation(loss: float, view: str = "true") -> Evaluation:
    return Evaluation("en", "en", view, 4, {"ar": loss, "mlm": loss + 2}, {})


def test_checkpoints_name_the_last_evaluation(life: Life) -> None:
    life.saver.note_evaluation(1, [evaluation(1.0), evaluation(9.0, "zero"), evaluation(3.0)])
    life.saver.save(at(1), wait=True)
    assert life.store.read(1).meta["evaluation"] == {"step": 1, "loss": 3.0}
    life.saver.note_evaluation(2, [])
    life.saver.note_evaluation(2, [evaluation(math.nan)])
    life.saver.save(at(2), wait=True, suspect=True)
    assert life.store.read(2).meta["evaluation"] == {"step": 1, "loss": 3.0}
    assert life.store.read(2).meta["suspect"] is True
    # A life that begins with it goes on with what it knows.
    saver = Saver(life.training, at(2), life.store.read(2).meta["evaluation"])
    saver.save(at(3), wait=True)
    assert life.store.read(3).meta["evaluation"] == {"step": 1, "loss": 3.0}


def test_the_end_of_a_life_by_an_error_commits_what_was_copied(life: Life) -> None:
    def fail() -> None:
        with life.saver.closing() as saver:
            saver.save(at(1), wait=False)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(life.store.steps()) == [1]
    assert life.kinds() == ["save"]
