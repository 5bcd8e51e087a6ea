"""How a life of a run begins and ends, in this process: what is refused, what is written, and what the events tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from damage import flip_a_bit
from training_run import TinyRun, build_shards

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.errors import CheckpointError, ConfigError, ExitCode, SupersededError
from rxt_dist.lives import Life, file_identity
from rxt_dist.ranks import Ranks
from rxt_dist.train import run as module
from rxt_dist.train.run import train
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.time_limit import TimeLimit

STEPS = 12
ALONE = Ranks(0, 1, 0)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


@pytest.fixture
def tiny(tmp_path: Path, shards: Path) -> TinyRun:
    return TinyRun(tmp_path, shards, STEPS)


def trained(tiny: TinyRun, *overrides: str, life: str = "one", stop: StopRequest | None = None) -> ExitCode:
    config = load_run(tiny.file, list(overrides))
    stop = stop or StopRequest(tiny.directory / "STOP")
    return train(config, ALONE, stop, life=Life(life, 1000.0, attempt=3))


def stopped(tiny: TinyRun, step: int, monkeypatch: pytest.MonkeyPatch, life: str = "one") -> None:
    """Train until a person makes a STOP file at the beginning of the boundary after `step`."""
    stop = StopRequest(tiny.directory / "STOP")

    def ask(event: dict[str, Any]) -> None:
        if event["kind"] == "save" and event["step"] >= step:
            stop.stop_file.touch()

    begin = module._begin

    def begun(config: Any, group: Any, claim: Any, *rest: Any) -> None:
        begin(config, group, claim, *rest)
        claim.directory.events.listen(ask)

    with monkeypatch.context() as asking:
        asking.setattr(module, "_begin", begun)
        assert trained(tiny, life=life, stop=stop) == ExitCode.STOPPED


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_events_of_two_lives(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tiny, 5, monkeypatch)
    (first,) = tiny.events("start")
    assert (first["life"], first["ranks"], first["attempt"]) == ("one", 1, 3)
    assert first["launched"] == "1970-01-01T00:16:40.000+00:00"
    (exited,) = tiny.events("exit")
    assert (exited["code"], exited["life"], exited["step"]) == (76, "one", tiny.events("stop")[0]["step"])
    assert exited["reason"] == f"stop file {tiny.directory / 'STOP'}"
    assert tiny.events("ready")[0]["step"] == 0
    # The file of the first life does not stop the second.
    assert trained(tiny, life="two") == ExitCode.DONE
    assert not (tiny.directory / "STOP").exists()
    assert [event["life"] for event in tiny.events("start")] == ["one", "two"]
    assert json.loads((tiny.directory / "life.json").read_text())["life"] == "two"
    (resumed,) = tiny.events("resume")
    assert resumed["step"] == exited["step"]
    assert tiny.events("ready")[1]["step"] == exited["step"]
    assert [(event["code"], event["reason"]) for event in tiny.events("exit")][1] == (0, "finished")
    assert json.loads((tiny.directory / "finished.json").read_text())["step"] == STEPS


@pytest.mark.slow
def test_a_finished_run_is_not_touched_by_another_launch(tiny: TinyRun, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained(tiny) == ExitCode.DONE
    # A torn line in the middle of what a disk has kept, and a lost finish.
    events = tiny.directory / "events.jsonl"
    events.write_bytes(events.read_bytes()[:200] + b"\x00")
    before = content(tiny.directory)
    assert trained(tiny, "parallel.zero=0", life="two") == ExitCode.DONE
    assert "run 'tiny' is finished" in capsys.readouterr().err
    assert content(tiny.directory) == before


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_finished_again(tiny: TinyRun) -> None:
    assert trained(tiny) == ExitCode.DONE
    store = CheckpointStore(tiny.directory / "checkpoints", 2)
    last = store.folder(STEPS) / "rank-00000.safetensors"
    sound, curve = last.read_bytes(), tiny.curve()
    flip_a_bit(last)
    assert trained(tiny, life="two") == ExitCode.DONE
    assert (last.read_bytes(), tiny.curve()) == (sound, curve)
    assert len(store.aside()) == len(tiny.events("resume")) == 1


def test_a_finished_run_without_a_sound_checkpoint_is_left_as_it_is(tiny: TinyRun) -> None:
    assert trained(tiny) == ExitCode.DONE
    for path in tiny.directory.glob("checkpoints/*/rank-00000.safetensors"):
        flip_a_bit(path)
    before = content(tiny.directory)
    with pytest.raises(CheckpointError, match="is valid, and this run will not start again"):
        trained(tiny, "log.every_steps=2", life="two")
    assert content(tiny.directory) == before


@pytest.mark.parametrize("witness", ["events.jsonl", "finished.json"])
def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tiny: TinyRun, witness: str, tmp_path: Path) -> None:
    """An empty folder may be where a disk belongs that is not mounted."""
    assert trained(tiny) == ExitCode.DONE
    checkpoints = tiny.directory / "checkpoints"
    checkpoints.rename(tmp_path / "away")
    checkpoints.mkdir()
    for other in {"events.jsonl", "finished.json"} - {witness}:
        (tiny.directory / other).unlink()
    before = content(tiny.directory)
    with pytest.raises(CheckpointError, match=f"tells of one at step {STEPS}, and this run will not begin again"):
        trained(tiny, life="two")
    assert content(tiny.directory) == before
    checkpoints.rmdir()
    (tmp_path / "away").rename(checkpoints)
    assert trained(tiny, life="three") == ExitCode.DONE


def test_what_was_saved_last_is_there_or_set_aside(tmp_path: Path) -> None:
    """Going back counts as well: an earlier checkpoint is the newest then."""
    run = RunDirectory(tmp_path)
    run.require_nothing_saved([])
    aside = tmp_path / "checkpoints/set-aside-1"
    (aside / "step-00000020").mkdir(parents=True)
    for kind, fields in (("save", {"step": 15}), ("save", {"step": 20})):
        run.events.append(kind, **fields)
    run.require_nothing_saved([aside])
    run.events.append("rollback", step=24, to_step=15)
    with pytest.raises(CheckpointError, match="tells of one at step 15"):
        run.require_nothing_saved([aside])


@pytest.mark.slow
def test_torn_events_and_metrics_do_not_stop_a_run(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped(tiny, 5, monkeypatch)
    for name in ("events.jsonl", "metrics.jsonl"):
        with open(tiny.directory / name, "ab") as file:
            file.write(b'{"time": "2030-01-01", "step": 6, "kind": "fin}')
    assert trained(tiny, life="two") == ExitCode.DONE
    assert [line["step"] for line in tiny.lines() if "ar_loss" in line] == list(range(1, STEPS + 1))
    assert len(tiny.events("start")) == 2


@pytest.mark.slow
def test_another_training_is_refused_by_the_checkpoint_alone(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.resolved.yaml was lost; other betas would go on from the moments of the first."""
    stopped(tiny, 5, monkeypatch)
    (tiny.directory / "config.resolved.yaml").unlink()
    before = content(tiny.directory)
    for change in ("optimizer.beta2=0.5", "optimizer.weight_decay=0.3", "stage.mlm_probability=0.3"):
        with pytest.raises(ConfigError, match="written with another training configuration"):
            trained(tiny, change, life="two")
        assert content(tiny.directory) == before
    assert trained(tiny, "log.every_steps=2", life="two") == ExitCode.DONE
    assert "training hash" in (tiny.directory / "config.resolved.yaml").read_text()


@pytest.mark.parametrize("lost", ["manifest", "a bit"])
def test_a_checkpoint_that_could_not_be_read_does_not_come_back(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lost: str
) -> None:
    """A life that took it later would leave a gap in metrics.jsonl, and be of a history that another has replaced."""
    stopped(tiny, 5, monkeypatch)
    store = CheckpointStore(tiny.directory / "checkpoints", 2)
    newest = store.folder(store.steps()[-1])
    metrics = (tiny.directory / "metrics.jsonl").read_bytes()
    if lost == "manifest":
        (newest / "manifest.json").rename(tiny.folder / "manifest.json")
    else:
        flip_a_bit(newest / "rank-00000.safetensors")
    assert trained(tiny, "log.every_steps=1", life="two") == ExitCode.DONE
    assert f"{newest} is rejected: " in capsys.readouterr().err
    (aside,) = store.aside()
    assert sorted(path.name for path in aside.iterdir()) == ["metrics.jsonl", newest.name]
    assert (aside / "metrics.jsonl").read_bytes() == metrics
    (told,) = tiny.events("set_aside")
    assert told["after"] == tiny.events("resume")[0]["step"] < store.steps()[-1]
    assert [line["step"] for line in tiny.lines() if "ar_loss" in line] == list(range(1, STEPS + 1))


def test_a_second_launch_writes_nothing_into_a_run_that_lives(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither its configuration, nor its environment; and a STOP that was meant for the first stays."""
    tried = []

    def while_it_lives(event: dict[str, Any]) -> None:
        if event["kind"] != "ready":
            return
        (tiny.directory / "STOP").touch()
        before = content(tiny.directory)
        with pytest.raises(ConfigError, match="is being trained by another process"):
            trained(tiny, "log.every_steps=3", life="two")
        assert content(tiny.directory) == before
        tried.append(True)

    begin = module._begin

    def begun(config: Any, group: Any, claim: Any, *rest: Any) -> None:
        begin(config, group, claim, *rest)
        claim.directory.events.listen(while_it_lives)

    monkeypatch.setattr(module, "_begin", begun)
    assert trained(tiny) == ExitCode.STOPPED
    assert tried == [True]


@pytest.mark.parametrize("moment", ["save", "ready"])
@pytest.mark.slow
def test_a_life_that_was_replaced_ends_and_touches_nothing(
    tiny: TinyRun, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Its machine was cut off, and the run has been started again elsewhere."""
    theirs = tiny.directory / "checkpoints/step-00000099.tmp/half"
    after: list[dict[Path, bytes]] = []

    def replace(event: dict[str, Any]) -> None:
        if event["kind"] == moment and not after:
            life = json.loads((tiny.directory / "life.json").read_text())
            (tiny.directory / "life.json").write_text(json.dumps(life | {"life": "two"}))
            theirs.parent.mkdir()
            theirs.write_text("of another life")
            after.append(content(tiny.directory))

    begin = module._begin

    def begun(config: Any, group: Any, claim: Any, *rest: Any) -> None:
        begin(config, group, claim, *rest)
        claim.directory.events.listen(replace)

    monkeypatch.setattr(module, "_begin", begun)
    with pytest.raises(SupersededError, match="has been started again as life two"):
        trained(tiny)
    changed = {path.name for path, written in content(tiny.directory).items() if after[0].get(path) != written}
    # At most the line that it was about to write: it ends at the next boundary, not at the next save.
    assert changed <= ({"metrics.jsonl", "events.jsonl"} if moment == "save" else {"events.jsonl"})
    assert [event["life"] for event in tiny.events("start")] == ["one"]
    assert not tiny.events("exit")
    assert not tiny.events("save_failed")


@pytest.mark.slow
def test_a_stop_that_was_made_while_ranks_imported_stops_the_run(tiny: TinyRun) -> None:
    """The launcher saw none when it began; a trainer that looks only now would take it for an old one."""
    tiny.directory.mkdir(parents=True)
    stop_file = tiny.directory / "STOP"
    stop_file.touch()
    assert trained(tiny, stop=StopRequest(stop_file, old_stop="")) == ExitCode.STOPPED
    assert stop_file.exists()
    old = file_identity(stop_file)
    assert trained(tiny, life="two", stop=StopRequest(stop_file, old_stop=old)) == ExitCode.DONE


@pytest.mark.slow
def test_the_time_limit_saves_and_asks_to_be_started_again(tiny: TinyRun) -> None:
    config = load_run(tiny.file, ["train.time_limit=1h"])
    life = Life("one", 0.0, deadline=1.0)
    stop = StopRequest(tiny.directory / "STOP", limit=TimeLimit.of("1h", life))
    assert train(config, ALONE, stop, life=life) == ExitCode.PREEMPTED
    assert tiny.events("stop")[0]["reason"] == "time limit of 1h"
    assert tiny.events("save")[-1]["step"] == tiny.events("stop")[0]["step"] == 1
    # Not a part of what training depends on.
    assert trained(tiny, life="two") == ExitCode.DONE


def test_an_error_is_told_and_a_crash_too(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr(module, "run_loop", crash)
    with pytest.raises(ZeroDivisionError):
        trained(tiny)
    (exited,) = tiny.events("exit")
    assert (exited["code"], exited["reason"]) == (1, "ZeroDivisionError: a slip")
    assert "ZeroDivisionError: a slip" in (tiny.directory / "logs/rank-00000.log").read_text()
    # A launcher knows better which rank began it.
    monkeypatch.setenv("RXT_LIFE", "two")
    with pytest.raises(ZeroDivisionError):
        trained(tiny, life="two")
    assert len(tiny.events("exit")) == 1


def test_a_place_where_a_folder_stands_for_a_file_is_a_sentence(tiny: TinyRun) -> None:
    for name in ("metrics.jsonl", "events.jsonl", "config.resolved.yaml", "logs/rank-00000.log"):
        (tiny.directory / name).mkdir(parents=True)
        with pytest.raises(ConfigError, match="cannot be read or written"):
            trained(tiny)
        shutil.rmtree(tiny.directory)
