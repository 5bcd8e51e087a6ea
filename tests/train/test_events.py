"""events.jsonl: whole lines, and what they say of a run that has ended."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest

from rxt_dist.errors import DiskError
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


@pytest.mark.parametrize(
    "torn", [b'{"time": "2030-01-01", "kind": "fin', b'{"a": "{}', b"\x00\x00", b'{"kind": "st\xc5', b"[]", b"{}"]
)
def test_a_torn_line_is_no_event_and_costs_none_after_it(log: EventLog, torn: bytes) -> None:
    log.append("save", step=5)
    with open(log.path, "ab") as file:
        file.write(torn)
    assert [event["kind"] for event in log.read()] == ["save"]
    log.append("stop", step=6)
    log.append("resume", step=6)
    assert [event["kind"] for event in log.read()] == ["save", "stop", "resume"]


def test_a_line_is_one_write(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between two writes would leave half a line, onto which the next life would append."""
    written: list[bytes] = []
    monkeypatch.setattr(os, "write", lambda file, line: (written.append(line), len(line))[1])
    log.append("save", step=1, path="x" * 100_000)
    (line,) = written
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1


def test_a_line_that_was_written_in_part_is_a_full_disk(log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "write", lambda file, line: len(line) - 1)
    with pytest.raises(DiskError, match="full"):
        log.append("save", step=1)


def test_a_listener_hears_what_is_appended(log: EventLog) -> None:
    heard: list[dict[str, object]] = []
    log.append("start")
    log.listen(heard.append)
    log.append("save", step=1, seconds=2.5)
    assert [(event["kind"], event["seconds"]) for event in heard] == [("save", 2.5)]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_said(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match="full"):
        EventLog(tmp_path / "events.jsonl").append("save", step=1)
