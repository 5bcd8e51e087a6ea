"""events.jsonl: what happened in the lives of a run, one line an event, never removed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rxt_dist.files import full_disk_errors


class EventLog:
    """The events of one run: begin (from other weights), resume, changed, unlocked, skip, save, stop, eval, profile,
    finish, wandb_lost."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, kind: str, **fields: Any) -> None:
        """Add one event.

        Raises:
            DiskError: the disk is full.
        """
        append_line(self.path, {"time": now(), "kind": kind, **fields})

    def read(self) -> list[dict[str, Any]]:
        """All events so far; a line that a crash cut off is none."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]

    def finished_at(self, step: int) -> bool:
        """Whether an earlier life trained and evaluated everything up to `step`."""
        return any(event["kind"] == "finish" and event["step"] == step for event in self.read())


def now() -> str:
    """The time, as lines state it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Add one line of JSON with one write to a file opened for appending: a kill leaves the line whole or absent.

    Raises:
        DiskError: the disk is full.
    """
    line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
    with full_disk_errors(path), open(path, "ab", buffering=0) as file:
        file.write(line.encode())
