"""events.jsonl: what happened in the lives of a run, one line an event, never removed.

A line may be torn: by a disk that was full for half of it, or by a machine that died. Whoever reads leaves such lines
out; whoever writes begins a line of its own after one. So nothing is a fact by an event alone that a run depends on.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rxt_dist.files import full_disk_errors


class EventLog:
    """The events of one run; docs/training.md lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listeners: list[Callable[[dict[str, Any]], None]] = []

    def append(self, kind: str, **fields: Any) -> None:
        """Add one event.

        Raises:
            DiskError: the disk is full.
        """
        event = {"time": now(), "kind": kind, **fields}
        for listener in self._listeners:
            listener(event)
        append_line(self.path, event)

    def listen(self, listener: Callable[[dict[str, Any]], None]) -> None:
        """Let `listener` have every event that this process appends from here on."""
        self._listeners.append(listener)

    def read(self) -> list[dict[str, Any]]:
        """All events so far."""
        return [event for event in read_lines(self.path) if isinstance(event.get("kind"), str)]


def now() -> str:
    """The time, as lines state it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def iso_time(seconds: float) -> str:
    """A time given in seconds since the epoch, as lines state it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of JSON lines; torn lines are left out, and a missing file has none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    parsed = (parse_line(line) for line in content.split(b"\n"))
    return [value for value in parsed if value is not None]


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The object in one line, or None where it is torn or no object."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # also of bytes that are no UTF-8
        return None
    return value if isinstance(value, dict) else None


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one line of JSON with one write to a file opened for appending: a kill leaves the line whole or absent.

    After a torn line it begins a new one.

    Raises:
        DiskError: the disk is full, perhaps after a part of the line.
    """
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
    with full_disk_errors(path):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            if os.write(file, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        finally:
            os.close(file)
