"""events.jsonl: whole lines, and what they say of a run that has ended."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from rxt_dist.errors import DiskError
from rxt_dist.train import events
from rxt_dist.train.events import EventLog


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl")


def test_events_are_read_as_they_were_written(log: EventLog) -> None:
    assert log.read() == []
    log.append("begin", step=0)
    log.append("stop", step=7, reason="zażółć\n{}")
    first, second = log.read()
    assert (first["kind"], first["step"]) == ("begin", 0)
    assert (second["kind"], second["reason"]) == ("stop", "zażółć\n{}")
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert list(first) == ["time", "kind", "step"]


def test_a_line_that_a_crash_cut_off_is_no_event(log: EventLog) -> None:
    log.append("save", step=5)
    with open(log.path, "a", encoding="utf-8") as file:
        file.write('{"time": "2030-01-01", "kind": "fin')
    assert [event["kind"] for event in log.read()] == ["save"]
    assert not log.finished_at(5)


def test_a_run_is_finished_at_the_step_of_its_finish_alone(log: EventLog) -> None:
    assert not log.finished_at(0)
    log.append("begin", step=0)
    log.append("save", step=10)
    log.append("eval", step=10, sources=2)
    assert not log.finished_at(10), "saved, but not yet evaluated"
    log.append("finish", step=10, tokens=640)
    assert log.finished_at(10)
    # The budget was raised afterwards, and the run went on.
    assert not log.finished_at(20)
    assert not log.finished_at(5)
    log.append("changed", setting="log.every_steps was 1, is 2")
    assert log.finished_at(10)
    log.append("finish", step=20, tokens=1280)
    assert log.finished_at(10)
    assert log.finished_at(20)


def test_a_line_is_one_write(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two writes would leave half a line, onto which the next life would append."""
    written: list[bytes] = []

    class File:
        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None: ...

        def write(self, content: bytes) -> None:
            written.append(content)

    def opened(path: Path, mode: str, buffering: int) -> File:
        assert (mode, buffering) == ("ab", 0)
        return File()

    monkeypatch.setattr(events, "open", opened, raising=False)
    log.append("save", step=1, path="x" * 100_000)
    (line,) = written
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="full"):
        EventLog(tmp_path / "events.jsonl").append("save", step=1)
