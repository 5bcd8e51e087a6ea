"""Hand-made logs of runs, whose times are seconds after a fixed moment."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

BEGUN = datetime(2026, 3, 1, 12, tzinfo=UTC)


def at(seconds: float) -> str:
    """A time as lines state it."""
    return (BEGUN + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


def moment(seconds: float) -> float:
    """The same as seconds since 1970."""
    return BEGUN.timestamp() + seconds


class Log:
    """The folder of a run that is written line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.resolved.yaml").write_text("# hash\nname: a-run\noptimizer: {lr: 0.001}\n")

    def event(self, time: float, kind: str, **fields: Any) -> Log:
        return self.raw("events.jsonl", json.dumps({"time": at(time), "kind": kind, **fields}) + "\n")

    def line(self, time: float, step: int, **fields: Any) -> Log:
        return self.raw("metrics.jsonl", json.dumps({"step": step, "time": at(time), **fields}) + "\n")

    def raw(self, name: str, text: str) -> Log:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(text)
        return self
