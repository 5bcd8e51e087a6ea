"""metrics.jsonl and events.jsonl, across crashes; wandb as a copy that may fail in any way."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rxt_dist.config.run import LogConfig
from rxt_dist.errors import ConfigError, DiskError
from rxt_dist.lives import Life
from rxt_dist.train.events import read_lines
from rxt_dist.train.metrics import MetricsWriter
from rxt_dist.train.run_dir import RunDirectory

SILENT = LogConfig(wandb="disabled")
OFFLINE = LogConfig(wandb="offline", wandb_project="a-project")


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "a-run")
    run.begin("seed: 7\n", "abc", Life("first", 0.0), ranks=1)
    return run


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def steps(run: RunDirectory) -> list[int]:
    return [line["step"] for line in lines(run.metrics)]


def test_one_line_a_log_step(run: RunDirectory) -> None:
    with MetricsWriter(run, SILENT, "id") as writer:
        writer.log(10, {"ar_loss": 3.5, "load": [1.0, 1.25]})
        writer.log(20, {"ar_loss": 3.25, "load": (1.0, 1.5)})
    first, second = lines(run.metrics)
    assert (first["step"], first["ar_loss"], first["load"]) == (10, 3.5, [1.0, 1.25])
    assert (second["step"], second["ar_loss"], second["load"]) == (20, 3.25, [1.0, 1.5])
    assert "nonfinite" not in first
    assert first["time"].endswith("+00:00")


def test_what_is_not_finite_is_null_and_named(run: RunDirectory) -> None:
    MetricsWriter(run, SILENT, "id").log(1, {"loss": math.nan, "norm": math.inf, "load": [1.0, -math.inf], "lr": 0.1})
    (line,) = lines(run.metrics)
    assert (line["loss"], line["norm"], line["load"], line["lr"]) == (None, None, [1.0, None], 0.1)
    assert line["nonfinite"] == {"loss": "nan", "norm": "inf", "load[1]": "-inf"}


def test_events_are_lines_with_a_kind(run: RunDirectory) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    writer.event("resume", step=120, reason="zażółć")
    writer.event("stop", reason="SIGTERM")
    assert [(line["kind"], line.get("step")) for line in lines(run.events.path)] == [("resume", 120), ("stop", None)]
    assert lines(run.events.path)[0]["reason"] == "zażółć"


def test_a_resume_drops_what_it_will_repeat(run: RunDirectory) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    for step in (10, 20, 30, 40):
        writer.log(step, {"loss": 1.0})
    writer.event("save", step=20)
    assert MetricsWriter(run, SILENT, "id").truncate_after(25) == 2
    assert steps(run) == [10, 20]
    assert writer.truncate_after(25) == 0
    writer.log(30, {"loss": 2.0})
    assert steps(run) == [10, 20, 30]
    assert len(lines(run.events.path)) == 1
    assert writer.truncate_after(0) == 3
    assert run.metrics.read_bytes() == b""


def test_a_line_cut_off_by_a_crash_is_dropped(run: RunDirectory) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    writer.log(10, {"loss": 1.0})
    whole = run.metrics.read_bytes()
    for rest in (b'{"step": 20, "lo', b'{"step": 20}', b"\x00\x00\x00\n", b"{}\n", b"[]\n", b"null\n"):
        run.metrics.write_bytes(whole + rest)
        assert writer.truncate_after(100) == 1
        assert run.metrics.read_bytes() == whole


def test_truncation_is_atomic(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    for step in (10, 20):
        writer.log(step, {"loss": 1.0})

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", kill)
    with pytest.raises(KeyboardInterrupt):
        writer.truncate_after(10)
    assert steps(run) == [10, 20]


def test_nothing_to_truncate_in_a_new_run(run: RunDirectory) -> None:
    assert MetricsWriter(run, SILENT, "id").truncate_after(0) == 0


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def test_a_full_disk_costs_lines_and_not_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    writer.log(1, {"loss": 1.0})
    with monkeypatch.context() as full:
        full.setattr(os, "write", refusing(errno.ENOSPC))
        for step in (2, 3, 4):
            writer.log(step, {"loss": 1.0})
        writer.event("skip", step=4)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "metrics.jsonl is full" in caplog.text
    writer.log(5, {"loss": 1.0})
    assert steps(run) == [1, 5]
    assert [(line["kind"], line["lines"]) for line in lines(run.events.path)] == [("lines_lost", 4)]
    assert "4 lines" in caplog.records[-1].getMessage()
    writer.log(6, {"loss": 1.0})
    assert len(caplog.records) == 2


def test_half_a_line_is_a_lost_line_and_the_next_one_is_whole(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk does that has room for a part of it."""
    write = os.write
    writer = MetricsWriter(run, SILENT, "id")
    with monkeypatch.context() as filling:
        filling.setattr(os, "write", lambda file, line: write(file, line[: len(line) // 2]))
        writer.log(1, {"loss": 1.0})
    writer.log(2, {"loss": 1.0})
    assert [line["step"] for line in read_lines(run.metrics)] == [2]
    assert run.metrics.read_bytes().count(b"\n") == 2
    assert writer.truncate_after(10) == 1
    assert steps(run) == [2]


def test_a_disk_that_fails_for_a_moment_is_a_crash(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    monkeypatch.setattr(os, "write", refusing(errno.ESTALE))
    with pytest.raises(OSError, match="Stale"):
        writer.log(1, {"loss": 1.0})


def test_a_run_directory_that_vanished_or_is_for_reading_only_is_a_sentence(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    with monkeypatch.context() as reading_only:
        reading_only.setattr(os, "write", refusing(errno.EROFS))
        with pytest.raises(ConfigError, match="Read-only file system"):
            writer.log(1, {"loss": 1.0})
    shutil.rmtree(run.path)
    with pytest.raises(DiskError, match="a-run is gone"):
        writer.log(1, {"loss": 1.0})


def test_the_end_is_a_fact_before_it_is_an_event(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(run, SILENT, "id")
    assert not run.finished_at(10)
    with monkeypatch.context() as full:
        full.setattr("rxt_dist.train.events.append_line", refusing(errno.ENOSPC))
        writer.event("finish", step=10, tokens=640)
    assert run.finished_at(10)
    assert not run.finished_at(5)
    assert json.loads(run.finished.read_text()) == {"step": 10, "tokens": 640, "training_hash": "abc"}
    run.finished.write_text("{")
    assert not run.finished_at(10)


def test_disabled_imports_nothing(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with MetricsWriter(run, SILENT, "id") as writer:
        writer.log(1, {"loss": 1.0})
    assert not run.events.path.exists()


class Wandb(types.ModuleType):
    """A stand-in that fails in the named function, for failures that a real one does not produce on demand."""

    def __init__(self, fails_in: str) -> None:
        super().__init__("wandb")
        self.fails_in = fails_in
        self.calls: list[str] = []

    def Settings(self, **_: object) -> None:  # noqa: N802
        self._call("Settings")

    def init(self, **_: object) -> Wandb:
        self._call("init")
        return self

    def define_metric(self, *_: object, **__: object) -> None:
        self._call("define_metric")

    def log(self, *_: object) -> None:
        self._call("log")

    def finish(self) -> None:
        self._call("finish")

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.fails_in:
            raise RuntimeError(f"{name}\n broke")


@pytest.mark.parametrize("fails_in", ["import", "Settings", "init", "define_metric", "log", "finish"])
def test_a_failing_wandb_is_one_event_and_one_warning(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_in: str
) -> None:
    wandb = None if fails_in == "import" else Wandb(fails_in)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with caplog.at_level(logging.WARNING), MetricsWriter(run, OFFLINE, "id") as writer:
        for step in (1, 2, 3):
            writer.log(step, {"loss": 1.0, "load": [1.0]})
    assert steps(run) == [1, 2, 3]
    (event,) = lines(run.events.path)
    assert event["kind"] == "wandb_lost"
    assert wandb is None or event["error"] == f"RuntimeError: {fails_in} broke"
    assert len(caplog.records) == 1
    assert wandb is None or wandb.calls.count("log") == {"log": 1, "finish": 3}.get(fails_in, 0)


@pytest.mark.slow
def test_the_real_wandb_offline_writes_into_the_run_directory(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path)
    with MetricsWriter(run, OFFLINE, "the-id") as writer:
        writer.log(1, {"loss": 1.0, "load": [1.0, 2.0]})
        writer.log(2, {"loss": math.nan, "load": [1.0, 2.0]})
    assert not run.events.path.exists()
    (written,) = (run.path / "wandb").glob("offline-run-*-the-id/*.wandb")
    assert written.stat().st_size > 0
    assert {path.name for path in tmp_path.iterdir()} == {"a-run", "home"}
    time.sleep(1)  # wandb names its folders by the second
    MetricsWriter(run, OFFLINE, "the-id").close()
    assert len(list((run.path / "wandb").glob("offline-run-*-the-id"))) == 2


def test_work_that_a_resume_repeats_is_counted(run: RunDirectory) -> None:
    """Of a line that begins before the checkpoint only the part after it; without `steps` the distance of lines."""
    writer = MetricsWriter(run, SILENT, "id")
    assert writer.lost_after(0) == {"lost_steps": 0, "lost_s": 0.0}
    writer.log(10, {"step_s": 3.0})
    writer.log(20, {"step_s": 2.0, "steps": 10})
    writer.log(20, {"eval/en/mlm_loss": 1.0})
    writer.log(30, {"step_s": 0.5})
    with open(run.metrics, "a") as file:
        file.write('{"step": 40, "step_s": 9')
    lost = writer.lost_after(15)
    assert (lost["lost_steps"], lost["lost_s"]) == (15, 5 * 2.0 + 10 * 0.5)
    assert lost["lost_until"].endswith("+00:00")
    assert writer.lost_after(30) == {"lost_steps": 0, "lost_s": 0.0}


def test_no_wait_for_wandb_is_longer_than_a_minute() -> None:
    """And of a version that does not know them all only those that it knows are asked for."""
    import wandb

    from rxt_dist.train.metrics import _patience

    assert _patience(wandb.Settings) == {"login_timeout": 30.0, "init_timeout": 30.0, "finish_timeout": 60.0}
    assert wandb.Settings(**_patience(wandb.Settings)).init_timeout == 30
    older = types.SimpleNamespace(model_fields={"init_timeout": None})
    assert _patience(older) == {"init_timeout": 30.0}
    assert _patience(None) == {}
