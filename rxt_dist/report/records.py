"""The files of a run as they are at this moment: a process may be writing them, a crash may have cut a line off.

Nothing here raises for what a line holds. A line that is no JSON object is none, a value that is no number is nan, and
a last line without its end is read when it has one. Files are read on from where the last look ended.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import yaml

from rxt_dist.errors import ConfigError
from rxt_dist.files import access_errors
from rxt_dist.finished import finished_step
from rxt_dist.train.events import parse_line
from rxt_dist.train.run_dir import leaves

_EVALUATION = "eval/"
# Of a list in a line, a value per layer; more would be no run of ours.
_LONGEST_LIST = 512
_COMPARED_BYTES = 256


class JsonLines:
    """New whole lines of a file of JSON objects, look by look."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        # The end of what was read: where something else stands there now, it is another file.
        self._end = b""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """(whether the file was replaced, so that all before is void; objects of the lines that are new).

        A resume replaces metrics.jsonl, because it drops what it will repeat.

        Raises:
            ConfigError, DiskError: the file cannot be read.
        """
        with access_errors(self.path):
            try:
                file = open(self.path, "rb")  # noqa: SIM115 - a missing file is no error, one that cannot be read is
            except FileNotFoundError:
                replaced, self._offset, self._end = self._offset > 0, 0, b""
                return replaced, []
            with file:
                file.seek(self._offset - len(self._end))
                replaced = file.read(len(self._end)) != self._end
                if replaced:
                    self._offset, self._end = 0, b""
                    file.seek(0)
                content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        self._offset += len(whole)
        self._end = (self._end + whole[-_COMPARED_BYTES:])[-_COMPARED_BYTES:]
        return replaced, [value for line in whole.splitlines() if (value := parse_line(line)) is not None]


class Figures:
    """Lines of metrics as columns of numbers; nan where a line says nothing. Lists are `name[0]`, `name[1]`, ..."""

    def __init__(self) -> None:
        self.rows = 0
        self._columns: dict[str, array[float]] = {}

    def add(self, line: Mapping[str, Any]) -> None:
        """Take in one line."""
        for name, value in line.items():
            if name == "time":
                self._set("time", seconds_of(value))
            elif isinstance(value, list):
                for index, one in enumerate(value[:_LONGEST_LIST]):
                    self._set(f"{name}[{index}]", number(one))
            elif not isinstance(value, (dict, str)):
                self._set(name, number(value))
        self.rows += 1

    def _set(self, name: str, value: float) -> None:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = array("d")
        if len(column) < self.rows:
            column.extend([math.nan] * (self.rows - len(column)))
        column.append(value)

    def with_times(self, times: Iterable[float]) -> Self:
        """The same lines with other times."""
        other = type(self)()
        other.rows, other._columns = self.rows, {**self._columns, "time": array("d", times)}
        return other

    @property
    def names(self) -> list[str]:
        """Names of all figures that any line has, in the order of their appearance."""
        return list(self._columns)

    def column(self, name: str) -> array[float]:
        """One number a line."""
        column = self._columns.get(name, array("d"))
        return column + array("d", [math.nan] * (self.rows - len(column)))

    def last(self, name: str) -> float:
        """The value of the last line that has one; nan."""
        return next((value for value in reversed(self.column(name)) if math.isfinite(value)), math.nan)


class RunFiles:
    """What the folder of a run says of it; `refresh` looks again.

    training, evaluations: the two kinds of lines of metrics.jsonl. events: in the order in which they were written.
    settings: config.resolved.yaml by dotted keys. finished: the step up to which it says that it is; None: it
    says none.

    Raises:
        ConfigError: it is no folder of a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        names = ("config.resolved.yaml", "metrics.jsonl", "events.jsonl")
        with access_errors(path):
            is_run = any((path / name).is_file() for name in names)
        if not is_run:
            raise ConfigError(
                f"{path} is not a run directory: it has none of {', '.join(names)}. Give the folder of a run, for "
                f"example runs/demo."
            )
        self._metrics, self._events = JsonLines(path / "metrics.jsonl"), JsonLines(path / "events.jsonl")
        self.training, self.evaluations = Figures(), Figures()
        self.events: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.finished: int | None = None
        self.refresh()

    @property
    def name(self) -> str:
        """What a person calls it: the name of its folder."""
        return self.path.resolve().name or str(self.path)

    def refresh(self) -> None:
        """Read what is new since the last look.

        Raises:
            ConfigError, DiskError: a file cannot be read.
        """
        replaced, lines = self._metrics.read()
        if replaced:
            self.training, self.evaluations = Figures(), Figures()
        for line in lines:
            if math.isfinite(number(line.get("step"))):
                evaluation = any(name.startswith(_EVALUATION) for name in line)
                (self.evaluations if evaluation else self.training).add(line)
        replaced, events = self._events.read()
        if replaced:
            self.events = []
        self.events += [event for event in events if isinstance(event.get("kind"), str)]
        if not self.settings:
            with suppress(RecursionError):
                self.settings = dict(leaves(_mapping(self.path / "config.resolved.yaml")))
        self.finished = finished_step(self.path)


def number(value: Any) -> float:
    """A number of a line as a float; nan for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def seconds_of(time: Any) -> float:
    """Seconds since 1970 of a time as lines state it; nan where it is none."""
    try:
        moment = datetime.fromisoformat(time)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _mapping(path: Path) -> Mapping[str, Any]:
    """Content of a YAML or JSON file; empty where it is absent or damaged."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, Mapping) else {}
