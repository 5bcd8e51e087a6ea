"""What two runs did differently, read from their folders: figures, states, settings, surroundings. Without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.store import CHECKSUM, CheckpointStore
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.locks import held
from rxt_dist.train.events import parse_line
from rxt_dist.train.run_dir import RunDirectory, leaves

# What of a metrics line depends on the clock, and the step, which names the line.
UNCOMPARED = frozenset({"step", "steps", "time", "tokens_per_s", "mfu", "step_s", "data_wait_s", "nonfinite"})
_EVALUATION = "eval/"


@dataclass(frozen=True)
class Line:
    """One line of metrics.jsonl: its figures (lists as `name[0]`, `name[1]`), and the step that it counts from."""

    since: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run says of it.

    lines: by step, and whether it is of an evaluation.
    checksums: of the state, by the steps of the checkpoints that are there.
    surroundings: machine, versions and code of its last life; ranks and data of its newest checkpoint.
    """

    path: Path
    lines: Mapping[tuple[int, bool], Line]
    checksums: Mapping[int, int]
    settings: Mapping[str, Any]
    surroundings: Mapping[str, Any]
    remarks: tuple[str, ...]

    @property
    def last_step(self) -> int:
        return max(step for step, _ in self.lines)


@dataclass(frozen=True)
class FieldDifference:
    """A figure that differs: where it first does, and where it does most. None: the line of that run has none."""

    name: str
    step: int
    a: float | None
    b: float | None
    relative: float
    largest: float
    largest_step: int


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other.

    fields: figures that differ by more than the tolerance, in the order in which they begin to.
    lines, lines_of_one: lines that both have; lines that only A, only B has.
    checksums: step, A's, B's, of the checkpoints that both have.
    settings, surroundings: key, A's, B's, where they differ.
    """

    fields: list[FieldDifference]
    lines: int
    lines_of_one: tuple[int, int]
    checksums: list[tuple[int, int, int]]
    settings: list[tuple[str, Any, Any]]
    surroundings: list[tuple[str, Any, Any]]
    remarks: list[str] = field(default_factory=list)

    @property
    def states_equal(self) -> bool:
        return all(a == b for _, a, b in self.checksums)


def read_run(path: Path) -> RunRecord:
    """Read the folder of a run that nobody is training.

    Raises:
        ConfigError: it is no run, or is being trained.
        DataError: it has no figures yet, or one of its files is damaged.
    """
    run = RunDirectory(path)
    if not run.config.is_file():
        raise ConfigError(
            f"{path} is not a run directory: it has no {run.config.name}. Give the folder of a run, for example "
            f"runs/demo."
        )
    if held(run.lock_file):
        raise ConfigError(
            f"{path} is being trained, and its figures change while they are read. Wait until it has ended, or stop "
            f"it (create {run.stop_file})."
        )
    entries, torn = _entries(run.metrics)
    resumed = [event["step"] for event in run.events.read() if event["kind"] == "resume"]
    checkpoints, remarks = _checkpoints(run)
    remarks += torn
    newest = checkpoints[max(checkpoints)] if checkpoints else {}
    environment = _mapping(run.environment) if run.environment.exists() else {}
    surroundings = {key: value for key, value in leaves(environment) if key != "time"}
    surroundings |= {"ranks": newest.get("ranks"), "data": _digests(newest)}
    settings = {key: value for key, value in leaves(_mapping(run.config)) if key != "name"}
    checksums = {step: meta[CHECKSUM] for step, meta in checkpoints.items() if CHECKSUM in meta}
    if older := [str(step) for step in checkpoints if step not in checksums]:
        remarks.append(f"{path}: checkpoints of an older version, whose states are not compared: {', '.join(older)}.")
    return RunRecord(path, _lines(entries, resumed), checksums, settings, surroundings, tuple(remarks))


def _digests(meta: Mapping[str, Any]) -> str | None:
    """The digests of the datasets that were read up to a checkpoint, whichever version wrote it."""
    data = meta.get("data", {})
    return " ".join(data.get("dataset_digests", ())) or data.get("dataset_digest")


def compare_runs(a: RunRecord, b: RunRecord, tolerance: float) -> Comparison:
    """Compare what both runs have.

    Args:
        tolerance: relative differences of figures up to this one count as none.

    Raises:
        DataError: no step has a line in both.
    """
    common = sorted(a.lines.keys() & b.lines.keys())
    if not common:
        raise DataError(
            f"{a.path} and {b.path} have no line of the same step, so there is nothing to compare. Train both with the "
            f"same log.every_steps."
        )
    found: dict[str, FieldDifference] = {}
    other_spans = 0
    for step, is_evaluation in common:
        one, other = a.lines[step, is_evaluation], b.lines[step, is_evaluation]
        same_span = one.since == other.since
        other_spans += not same_span
        for name in one.figures.keys() | other.figures.keys():
            if same_span or not _over_steps(name):
                _note(found, name, step, one.figures.get(name), other.figures.get(name), tolerance)
    remarks = [*a.remarks, *b.remarks]
    if other_spans:
        remarks.append(
            f"{other_spans} lines are means over other steps in one run than in the other (another log.every_steps, or "
            f"a life that began in between): their losses and accuracies are not compared"
        )
    only = len(a.lines) - len(common), len(b.lines) - len(common)
    checksums = [(step, a.checksums[step], b.checksums[step]) for step in sorted(a.checksums.keys() & b.checksums)]
    fields = sorted(found.values(), key=lambda found: (found.step, -found.relative, found.name))
    settings, surroundings = _unequal(a.settings, b.settings), _unequal(a.surroundings, b.surroundings)
    return Comparison(fields, len(common), only, checksums, settings, surroundings, remarks)


def relative_difference(a: float | None, b: float | None) -> float:
    """|a - b| over the larger of both; infinite where only one is there or finite, none where both are the same."""
    if a == b or (a is not None and b is not None and math.isnan(a) and math.isnan(b)):
        return 0.0
    if a is None or b is None or not (math.isfinite(a) and math.isfinite(b)):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def _note(
    found: dict[str, FieldDifference], name: str, step: int, a: float | None, b: float | None, tolerance: float
) -> None:
    """Take in the values of one figure at one step, later ones after earlier ones."""
    relative = relative_difference(a, b)
    if relative <= tolerance:
        return
    known = found.get(name)
    if known is None:
        found[name] = FieldDifference(name, step, a, b, relative, relative, step)
    elif relative > known.largest:
        found[name] = FieldDifference(name, known.step, known.a, known.b, known.relative, relative, step)


def _over_steps(name: str) -> bool:
    """Whether a figure is of all steps since the line before, and not of the last one alone."""
    return not name.startswith(_EVALUATION) and (name.endswith(("_loss", "_accuracy")) or name == "skipped")


def _mapping(path: Path) -> Mapping[str, Any]:
    """The content of a YAML or JSON file, which is YAML too."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, Mapping):
        raise DataError(f"{path} is damaged: it is no mapping that can be read as YAML. Restore it from a copy.")
    return content


def _entries(metrics: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """All lines of a file of metrics, and what there is to say about those that a crash or a full disk has torn."""
    lines = [line for line in metrics.read_bytes().split(b"\n") if line.strip()] if metrics.exists() else []
    if not lines:
        raise DataError(f"{metrics} has no line yet, so there is nothing to compare. Train the run first.")
    parsed = [parse_line(line) for line in lines]
    entries = [entry for entry in parsed if entry is not None and isinstance(entry.get("step"), int)]
    torn = len(lines) - len(entries)
    return entries, [f"{metrics}: {torn} torn lines are left out"] if torn else []


def _lines(entries: list[dict[str, Any]], resumed: list[int]) -> dict[tuple[int, bool], Line]:
    """Lines by step and kind.

    Args:
        resumed: the steps at which later lives began, in the order of the lives. A mean over steps begins anew there.
    """
    begun: list[int] = []
    for step in resumed:
        # A life from an older checkpoint wrote the lines of those after it again.
        begun = [*(earlier for earlier in begun if earlier < step), step]
    lines: dict[tuple[int, bool], Line] = {}
    before = 0
    for entry in entries:
        step = entry["step"]
        is_evaluation = any(name.startswith(_EVALUATION) for name in entry)
        since = max([before, *(start for start in begun if start < step)])
        # Lines say it themselves; before they did, a mean began anew with every life.
        since = step - entry["steps"] if "steps" in entry else since
        lines[step, is_evaluation] = Line(step if is_evaluation else since, dict(_figures(entry)))
        if not is_evaluation:
            before = step
    return lines


def _figures(entry: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """One number per name; what JSON could not hold comes back from `nonfinite`."""
    nonfinite = entry.get("nonfinite", {})
    for name, value in entry.items():
        if name in UNCOMPARED:
            continue
        single = {f"{name}[{i}]": one for i, one in enumerate(value)} if isinstance(value, list) else {name: value}
        for own, number in single.items():
            yield own, float(nonfinite[own] if number is None else number)


def _checkpoints(run: RunDirectory) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """Meta of the committed checkpoints by step, and what there is to say about those that are not readable."""
    found, remarks = {}, []
    store = CheckpointStore(run.checkpoints, MIN_KEEP)
    for info in store.list():
        if info.committed and info.problem:
            remarks.append(f"checkpoint {info.path} is not compared: {info.problem}")
        elif info.committed:
            found[info.step] = store.read(info.step).meta
    return found, remarks


def _unequal(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = {**a, **b}
    return [(key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]
