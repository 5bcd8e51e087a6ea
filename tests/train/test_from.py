"""`train --from step-N`: a run begins again at an older checkpoint, and nothing that came later is lost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from training_run import STEP_TOKENS, TinyRun, build_shards

from rxt_dist.checkpoint.host_copy import HostCopy
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.commands.train import _step
from rxt_dist.config.load import load_run
from rxt_dist.errors import CheckpointError, ConfigError, ExitCode
from rxt_dist.ranks import Ranks
from rxt_dist.train import run as module
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

STEPS = 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A finished run with a checkpoint of every step, none of it copied before the next update could begin."""
    folder = tmp_path_factory.mktemp("first")
    tiny = TinyRun(folder, build_shards(folder), STEPS)
    copy, before_change, asked = HostCopy._copy, HostCopy.before_change, threading.Event()

    def slowly(self: HostCopy, blocks: Any) -> None:
        asked.wait(2)
        time.sleep(0.05)
        copy(self, blocks)
        asked.clear()

    def ask(self: HostCopy) -> None:
        asked.set()
        before_change(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostCopy, "_copy", slowly)
        patch.setattr(HostCopy, "before_change", ask)
        assert trained(tiny) == ExitCode.DONE
    assert all(event["stall_s"] > 0.04 for event in tiny.events("save")[:-1]), "updates wait for what is copied"
    return tiny


def trained(tiny: TinyRun, from_step: int | None = None) -> ExitCode:
    config = load_run(tiny.file, [f"checkpoint={{every_tokens: {STEP_TOKENS}, keep: {STEPS}}}"])
    return train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP"), from_step=from_step)


def die(*_: object) -> None:
    raise ZeroDivisionError


@pytest.mark.slow
def test_a_run_begins_again_at_an_older_checkpoint(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tiny.directory / "checkpoints", 2)
    curve, metrics = tiny.curve(), (tiny.directory / "metrics.jsonl").read_bytes()
    last = (store.folder(STEPS) / "rank-00000.safetensors").read_bytes()
    assert list(store.steps()) == [1, 2, 3, 4]
    with pytest.raises(CheckpointError, match=r"--from names step 7, .* its steps are: 1, 2, 3, 4"):
        trained(tiny, 7)
    damaged = store.folder(1) / "routing.safetensors"
    sound = damaged.read_bytes()
    damaged.write_bytes(sound[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"step-00000001 is rejected: routing.safetensors.* Name another step"):
        trained(tiny, 1)
    damaged.write_bytes(sound)
    assert list(store.steps()) == [1, 2, 3, 4], "a refusal moves nothing"
    assert not store.aside()
    assert (tiny.directory / "finished.json").exists()
    with monkeypatch.context() as dying:
        dying.setattr(module, "run_loop", die)
        with pytest.raises(ZeroDivisionError):
            trained(tiny, 2)
    assert not (tiny.directory / "finished.json").exists(), "what is done again is not finished"
    assert list(store.steps()) == [1, 2]
    assert trained(tiny) == ExitCode.DONE
    assert {event["step"] for event in tiny.events("resume")} == {2}
    assert [event["after"] for event in tiny.events("set_aside")] == [2]
    (aside,) = store.aside()
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", "step-00000003", "step-00000004"]
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    assert (aside / "step-00000004/rank-00000.safetensors").read_bytes() == last
    # The same data and configuration, so the same end.
    assert tiny.curve() == curve
    assert list(store.steps()) == [1, 2, 3, 4]
    assert (store.folder(STEPS) / "rank-00000.safetensors").read_bytes() == last


def test_a_life_that_dies_while_it_is_set_up_has_taken_the_run_to_the_named_one(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher then starts the next one without the name."""
    with monkeypatch.context() as dying:
        dying.setattr(module, "build_engine", die)
        with pytest.raises(ZeroDivisionError):
            trained(tiny, 3)
    assert list(CheckpointStore(tiny.directory / "checkpoints", 2).steps()) == [1, 2, 3]
    assert tiny.events("start")
    assert tiny.events("set_aside")[-1]["after"] == 3
    assert trained(tiny) == ExitCode.DONE
    assert tiny.events("resume")[-1]["step"] == 3


@pytest.mark.slow
def test_the_newest_checkpoint_may_be_named(tiny: TinyRun) -> None:
    before = CheckpointStore(tiny.directory / "checkpoints", 2).aside()
    assert trained(tiny, STEPS) == ExitCode.DONE
    assert CheckpointStore(tiny.directory / "checkpoints", 2).aside() == before


@pytest.mark.parametrize("name", ["step-120", "step-00000120", "120"])
def test_a_checkpoint_is_named_by_its_step(name: str) -> None:
    assert _step(name) == 120
    assert _step(None) is None


@pytest.mark.parametrize("name", ["", "latest", "step-", "step-1.5", "-3", "step--3", "²", "9" * 30])
def test_what_is_no_step_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"but a checkpoint is named step-N"):
        _step(name)


def test_a_name_is_understood_before_anything_is_read(tmp_path: Path) -> None:
    from rxt_dist.commands.train import train as command

    with pytest.raises(ConfigError, match="--from"):
        command(tmp_path / "nothing.yaml", from_checkpoint="newest")
