"""Runs that go astray: back to a checkpoint from before, over the rows that did it, and on."""

from __future__ import annotations

import errno
import json
import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_run import SEQ_LEN, STEP_TOKENS, TinyRun, build_shards

from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError, ConfigError, DivergedError, ExitCode, ReplicaError
from rxt_dist.ranks import Ranks
from rxt_dist.stages.joint import JointStage
from rxt_dist.train import rollback, saving
from rxt_dist.train.rollback import Jump, is_jumped, joined_windows, read_jumps, spans, write_jumps
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

ROWS = STEP_TOKENS // SEQ_LEN
STEPS = 25
# A checkpoint at 5, 10, ...; three updates in a row that are skipped make a run go back.
OFTEN = ["train.max_skipped_steps=3", "checkpoint.keep=3"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(tmp_path: Path, shards: Path) -> TinyRun:
    return TinyRun(tmp_path, shards, STEPS)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Rows on which the second layer of the decoder gives NaN; add some."""
    rows: set[int] = set()
    forward = JointStage.forward

    def spoilt(stage: Any, micro: Any, load_ME: Any) -> Any:
        if not rows.intersection(micro.samples):
            return forward(stage, micro, load_ME)
        layer = stage.model.decoder.layers[1]
        handle = layer.feed_forward.register_forward_hook(lambda _, __, value: (value[0] * math.nan, *value[1:]))
        try:
            return forward(stage, micro, load_ME)
        finally:
            handle.remove()

    monkeypatch.setattr(JointStage, "forward", spoilt)
    return rows


def run(tiny: TinyRun, *overrides: str) -> ExitCode:
    config = load_run(tiny.file, [*OFTEN, *overrides])
    with StopRequest(tiny.directory / "STOP") as stop:
        return train(config, Ranks(0, 1, 0), stop)


def rows_of(first: int, last: int) -> set[int]:
    """The rows of steps `first` to `last`."""
    return set(range((first - 1) * ROWS, last * ROWS))


def committed(tiny: TinyRun) -> list[int]:
    return list(CheckpointStore(tiny.directory / "checkpoints", 2).steps())


@pytest.mark.slow
def test_a_poisoned_window_is_jumped_over_and_the_run_finishes(tiny, poisoned):
    poisoned |= rows_of(13, 20)
    assert run(tiny, "log.every_steps=4", "train.micro_batch_rows=4") == ExitCode.DONE
    # 13 to 15 were skipped; the update of 12, the last before, may have been the reason: so it goes too. Then 16 to 18
    # were; the last update before them was 11. Of 19 and 20 each was skipped alone.
    backs = [(back["step"], back["to_step"], back["rows"]) for back in tiny.events("rollback")]
    assert backs == [(15, 10, [11 * ROWS, 15 * ROWS]), (18, 10, [10 * ROWS, 18 * ROWS])]
    assert [event["step"] for event in tiny.events("jump")] == [12, 13, 14, 15, *range(11, 19)]
    skips = tiny.events("skip")
    assert [skip["step"] for skip in skips] == [13, 14, 15, 16, 17, 18, 19, 20]
    assert {(skip["rank"], skip["layer"]) for skip in skips} == {(0, "decoder.layers.1")}
    assert skips[0]["samples"] == list(range(12 * ROWS, 12 * ROWS + 4))
    assert [event["step"] for event in tiny.events("finish")] == [STEPS]
    lines = [line["step"] for line in tiny.lines() if "ar_loss" in line]
    assert lines == sorted(set(lines))


@pytest.mark.slow
def test_a_kill_between_the_note_and_the_load_loses_nothing(tiny, poisoned, tmp_path, monkeypatch):
    """And what is left of the history that was given up is not taken."""
    poisoned |= rows_of(14, 16)
    whole = TinyRun(tmp_path / "whole", tiny.shards, STEPS)
    whole.folder.mkdir()
    assert run(whole) == ExitCode.DONE

    class Killed(BaseException):
        pass

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    load = rollback.load_state
    monkeypatch.setattr(rollback, "load_state", kill)
    with pytest.raises(Killed):
        run(tiny)
    monkeypatch.setattr(rollback, "load_state", load)
    (jump,) = read_jumps(tiny.directory / "jumps.json")
    assert (jump.window, jump.to_step) == ((12 * ROWS, 16 * ROWS), 10)
    # As if the kill had come before the checkpoints were set aside too.
    stale = shutil.copytree(tiny.directory / "checkpoints/step-00000010", tiny.directory / "checkpoints/other")
    manifest = json.loads((stale / "manifest.json").read_text())
    manifest["meta"]["position"] |= {"step": 13}
    body = {key: value for key, value in manifest.items() if key != "digest"} | {"step": 13}
    from rxt_dist.checkpoint import store

    (stale / "manifest.json").write_text(json.dumps({**body, "digest": store._digest(body)}))
    stale.rename(stale.with_name("step-00000013"))
    with pytest.raises(CheckpointError, match="step 13, which is of a history that this run has gone back"):
        train(load_run(tiny.file, OFTEN), Ranks(0, 1, 0), StopRequest(tiny.directory / "STOP"), from_step=13)
    with pytest.raises(ConfigError, match="another training configuration"):
        run(tiny, "optimizer.beta2=0.5")
    assert 13 in committed(tiny), "a refusal moves nothing"
    metrics = (tiny.directory / "metrics.jsonl").read_bytes()
    assert run(tiny) == ExitCode.DONE
    (told,) = tiny.events("set_aside")
    assert told["after"] == 10
    assert (tiny.directory / told["path"] / "metrics.jsonl").read_bytes() == metrics
    assert tiny.events("resume")[0]["step"] == 10
    assert tiny.curve() == whole.curve()
    assert 13 not in committed(tiny)


@pytest.mark.slow
def test_a_rate_that_is_too_high_ends_the_run_and_a_lower_one_goes_on(tiny):
    """Nothing spoilt is committed, however often it is tried."""
    assert run(tiny) == ExitCode.DONE
    for folder in sorted((tiny.directory / "checkpoints").glob("step-*"))[-2:]:
        shutil.rmtree(folder)
    for name in ("finished.json", "events.jsonl"):
        (tiny.directory / name).unlink(missing_ok=True)
    before = committed(tiny)
    for _ in range(2):
        with pytest.raises(DivergedError, match="Start the run again with a lower") as caught:
            run(tiny, "optimizer.lr=1e30", "train.max_skipped_steps=2")
        # Nothing is saved while steps are passed over: it would push out what was before.
        assert "goes on from step-00000015" in str(caught.value)
        assert (before, committed(tiny)) == ([15], [15])
        assert f"Rows {15 * ROWS} to {21 * ROWS - 1} stay passed over" in str(caught.value)
        assert "`--from step-15` trains on them, and on all that was passed over later, again" in str(caught.value)
    assert len(tiny.events("rollback")) == 2
    assert run(tiny, "optimizer.lr=1e-4") == ExitCode.DONE
    assert all(line["ar_loss"] is not None for line in tiny.lines() if "ar_loss" in line)


@pytest.mark.slow
def test_rows_that_a_wrong_rate_passed_over_are_trained_on_from_a_named_step(tiny, tmp_path):
    """It was not the data: as if the wrong rate had never been tried."""
    whole = TinyRun(tmp_path / "whole", tiny.shards, STEPS)
    whole.folder.mkdir()
    for one in (tiny, whole):
        assert run(one) == ExitCode.DONE
        for folder in sorted((one.directory / "checkpoints").glob("step-*"))[-2:]:
            shutil.rmtree(folder)
        for name in ("finished.json", "events.jsonl"):
            (one.directory / name).unlink(missing_ok=True)
    with pytest.raises(DivergedError):
        run(tiny, "optimizer.lr=1e30", "train.max_skipped_steps=2")
    jumps = (tiny.directory / "jumps.json").read_bytes()
    jumped = len(tiny.events("jump"))
    config = load_run(tiny.file, [*OFTEN, "optimizer.lr=1e-4"])
    assert train(config, Ranks(0, 1, 0), StopRequest(tiny.directory / "STOP"), from_step=15) == ExitCode.DONE
    assert len(tiny.events("jump")) == jumped
    (again,) = tiny.events("again")
    assert again["rows"] == [[15 * ROWS, 18 * ROWS], [18 * ROWS, 21 * ROWS]]
    assert read_jumps(tiny.directory / "jumps.json") == []
    (copy,) = tiny.directory.glob("jumps-until-*.json")
    assert copy.read_bytes() == jumps
    assert run(whole, "optimizer.lr=1e-4") == ExitCode.DONE
    assert tiny.curve() == whole.curve()


@pytest.mark.slow
def test_a_run_that_never_trained_well_keeps_nothing(tiny):
    for _ in range(2):
        with pytest.raises(DivergedError, match="No checkpoint is from before it"):
            run(tiny, "optimizer.lr=1e30", f"checkpoint.every_tokens={STEP_TOKENS}")
        assert committed(tiny) == []
    assert run(tiny) == ExitCode.DONE


@pytest.mark.slow
def test_a_run_does_not_end_on_skipped_updates(tiny, poisoned):
    poisoned |= rows_of(STEPS, STEPS)
    assert run(tiny) == ExitCode.DONE
    (back,) = tiny.events("rollback")
    assert (back["step"], back["to_step"], back["reason"]) == (
        STEPS,
        20,
        "the last updates of the run were not finite",
    )
    assert [event["step"] for event in tiny.events("jump")] == [STEPS - 1, STEPS]
    store = CheckpointStore(tiny.directory / "checkpoints", 2)
    assert store.read(STEPS).meta["health"]["streak"] is None
    assert len(store.read(STEPS).meta["position"]["jumps"]) == 1


@pytest.mark.slow
def test_a_disk_that_cannot_be_read_for_now_costs_no_checkpoint(tiny, poisoned, monkeypatch):
    """There is nothing to go back to, but that is no reason to begin anew."""
    from rxt_dist import files
    from rxt_dist.checkpoint import store

    poisoned |= rows_of(13, 20)

    def fail(*_: Any) -> str:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as failing:
        failing.setattr(store, "blake3_file", fail)
        failing.setattr(files, "_READ_PAUSES", (0.0,))
        with pytest.raises(DivergedError, match=r"could be gone back to: .*step-00000010 is rejected: .*cannot be"):
            run(tiny)
    assert committed(tiny) == [5, 10]
    assert read_jumps(tiny.directory / "jumps.json") == []
    poisoned.clear()
    assert run(tiny) == ExitCode.DONE
    assert [event["step"] for event in tiny.events("resume")] == [10]


@pytest.mark.slow
def test_a_stop_while_updates_are_skipped_waits_for_the_save_before(tiny, poisoned, monkeypatch):
    """It commits nothing of its own, and does not give up what is good."""
    poisoned |= rows_of(6, 7)
    write = BackgroundSaves._write

    def slowly(*arguments: Any) -> None:
        time.sleep(1.0)
        write(*arguments)

    class Skipped(StopRequest):
        @property
        def reason(self) -> str | None:
            return "a signal" if tiny.events("skip") else None

    monkeypatch.setattr(BackgroundSaves, "_write", slowly)
    monkeypatch.setattr(saving, "_GRACE_SECONDS", 0.0)
    stop = Skipped(tiny.directory / "STOP")
    assert train(load_run(tiny.file, OFTEN), Ranks(0, 1, 0), stop) == ExitCode.PREEMPTED
    assert (committed(tiny), tiny.events("stop")[0]["step"]) == ([5], 6)


@pytest.mark.slow
def test_nothing_is_committed_while_updates_are_skipped_and_it_is_made_up_for(tiny, poisoned):
    poisoned |= rows_of(10, 11)
    assert run(tiny) == ExitCode.DONE
    saves = [event["step"] for event in tiny.events("save")]
    assert saves == [5, 12, 15, 20, 25]
    skips = tiny.events("skip")
    assert [(skip["step"], skip["in_a_row"]) for skip in skips] == [(10, 1), (11, 2)]


@pytest.mark.slow
def test_lines_after_a_kill_are_those_of_an_undisturbed_run(tiny, tmp_path, monkeypatch):
    """With log.every_steps above 1 a line's means begin before the checkpoint; and the evaluation is written once."""
    from rxt_dist.train import loop

    whole = TinyRun(tmp_path / "whole", tiny.shards, STEPS)
    whole.folder.mkdir()
    options = ["log.every_steps=7", f"eval.every_tokens={10 * STEP_TOKENS}"]
    assert run(whole, *options) == ExitCode.DONE

    class Killed(BaseException):
        pass

    for step in (18, 23):

        def kill(self: Any, batch_step: Any, batch: Any, at: int = step, go_on: Any = loop._Life._step) -> None:
            if self.position.step + 1 == at:
                raise Killed
            go_on(self, batch_step, batch)

        with monkeypatch.context() as patch:
            patch.setattr(loop._Life, "_step", kill)
            with pytest.raises(Killed):
                run(tiny, *options)
    # Between the last evaluation and the note that the run is finished.
    with monkeypatch.context() as patch:
        from rxt_dist.train.reporter import Reporter

        told = Reporter.event

        def die(self: Any, kind: str, **fields: Any) -> None:
            if kind == "finish":
                raise Killed
            told(self, kind, **fields)

        patch.setattr(Reporter, "event", die)
        with pytest.raises(Killed):
            run(tiny, *options)
    assert run(tiny, *options) == ExitCode.DONE
    assert [event["step"] for event in tiny.events("resume")] == [15, 20, 25]
    timed = ("time", "tokens_per_s", "mfu", "step_s", "data_wait_s")
    plain = [[{k: v for k, v in line.items() if k not in timed} for line in one.lines()] for one in (tiny, whole)]
    assert plain[0] == plain[1]


def test_copies_that_differ_end_the_run_before_anything_is_committed(tiny, monkeypatch):
    monkeypatch.setattr(PlainEngine, "differing_ranks", lambda engine: [0])
    with pytest.raises(ReplicaError, match="look at rank 0 on "):
        run(tiny)
    assert committed(tiny) == []
    assert tiny.events("replica")[0]["rank"] == 0
    assert ReplicaError.exit_code == 1


def test_what_was_passed_over_long_before_was_not_in_vain():
    def jump(first: int, end: int, to_step: int, lr: float = 1e-3) -> Jump:
        return Jump(first, end, to_step, to_step + 3, lr, 1.0, "why")

    first, second, third = jump(8, 16, 1), jump(800, 816, 100), jump(810, 832, 100)
    assert rollback._in_vain(jump(832, 840, 100), [first, second, third]) == [third, second]
    assert rollback._in_vain(jump(900, 916, 112), [first, second]) == []
    assert rollback._in_vain(jump(816, 832, 100, lr=1e-4), [first, second]) == []
    assert rollback._in_vain(second, [first, second]) == []


def test_windows_are_joined_and_touched():
    assert spans([(8, 16), (0, 4), (16, 2000)]) == "0 to 3, 8 to 1,999"
    assert joined_windows([(8, 16)], [[0, 4], [8, 16]]) == ((0, 4), (8, 16))
    assert is_jumped(0, 8, [(7, 9)])
    assert not is_jumped(0, 8, [(8, 16)])
    assert not is_jumped(16, 24, [(8, 16)])


def test_a_folder_in_the_place_of_the_note_is_a_sentence(tmp_path):
    (tmp_path / "jumps.json").mkdir()
    with pytest.raises(ConfigError, match=r"jumps.json cannot be read"):
        rollback.read_past(Collectives(torch.device("cpu")), CheckpointStore(tmp_path, 2), tmp_path / "jumps.json")


def test_a_damaged_note_is_refused(tmp_path):
    path = tmp_path / "jumps.json"
    assert read_jumps(path) == []
    jump = Jump(8, 16, 1, 2, 1e-3, 1.0, "why")
    write_jumps(path, [jump])
    assert read_jumps(path) == [jump]
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole.replace(b'"to_step": 1', b'"to_step": 0'), b"[]", b"{}", b"\xff"):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            read_jumps(path)
