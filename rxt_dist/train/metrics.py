"""What a run writes about its figures: metrics.jsonl (the truth), and a copy for Weights & Biases.

Lines are appended with one write each, so that a killed process leaves whole lines. A full disk costs lines and never
the run: it is said once, and how many were lost once there is room. JSON has no NaN: a value that is
not finite is written as null and named under `nonfinite`, for example
`{"step": 7, "ar_loss": null, "nonfinite": {"ar_loss": "nan"}}`.
"""

from __future__ import annotations

import errno
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import yaml

from rxt_dist.config.run import LogConfig
from rxt_dist.errors import DiskError
from rxt_dist.files import lasting_errors, write_atomic
from rxt_dist.train.events import append_line, now, parse_line
from rxt_dist.train.run_dir import RunDirectory

Value = float | Sequence[float]
_LOGGER = logging.getLogger(__name__)
# Neither a login prompt on somebody's terminal nor a network that is away must hold up a cluster: the start or the end
# of a run waits so long for each of these, of which some versions of wandb do not know all.
_WANDB_SECONDS = {"login_timeout": 30.0, "init_timeout": 30.0, "finish_timeout": 60.0}


class MetricsWriter:
    """Writer of one run's metrics and events; rank 0 only. A context manager that closes the wandb copy.

    Args:
        run: the opened run directory.
        log: whether and where wandb keeps its copy.
        run_id: wandb's identity of the run; the same one after a resume continues the same curve.
    """

    def __init__(self, run: RunDirectory, log: LogConfig, run_id: str) -> None:
        self.run = run
        self._wandb: Any = None
        self._lost_lines = 0
        if log.wandb != "disabled":
            self._start_wandb(log, run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def log(self, step: int, values: Mapping[str, Value]) -> None:
        """Append one line for `step`. Lists are written as lists (a load per layer, for example).

        Raises:
            DiskError, ConfigError: the file cannot be written to, for another reason than a full disk.
        """
        finite, nonfinite = _finite(values)
        line = {"step": step, "time": now(), **finite}
        full = {**line, "nonfinite": nonfinite} if nonfinite else line
        self._write(lambda: append_line(self.run.metrics, full))
        if self._wandb is not None:
            try:
                self._wandb.log({"step": step, **_flat(values)})
            except Exception as error:
                self._give_up_wandb(error)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event to events.jsonl (see `EventLog`); raises as `log`."""
        if kind == "finish":
            # The fact before the line about it: a line can be lost.
            with lasting_errors(self.run.path):
                self.run.record_finish(fields["step"], fields["tokens"])
        self._write(lambda: self.run.events.append(kind, **fields))

    def _write(self, append: Callable[[], None]) -> None:
        """Append a line; on a full disk it is lost and counted."""
        try:
            with lasting_errors(self.run.path):
                append()
        except DiskError as error:
            if not _is_full(error):
                raise
            self._lost_lines += 1
            if self._lost_lines == 1:
                _LOGGER.warning("%s Training goes on without the lines of metrics.jsonl and events.jsonl.", error)
            return
        lost, self._lost_lines = self._lost_lines, 0
        if lost:
            _LOGGER.warning("The disk has room again; %d lines of metrics.jsonl and events.jsonl were lost.", lost)
            self.event("lines_lost", lines=lost)
            # Were the disk full again already, the event is one of the lines to be told of next time.
            self._lost_lines += lost if self._lost_lines else 0

    def truncate_after(self, step: int) -> int:
        """Drop the lines of steps after `step`, which a resume will repeat, and a line cut off by a crash.

        Call it at the start of every life of a run, with the resumed step or 0. Atomic. Returns the lines dropped.
        """
        if not self.run.metrics.exists():
            return 0
        lines = self.run.metrics.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _is_up_to(line, step)]
        if len(kept) < len(lines):
            write_atomic(self.run.metrics, b"".join(kept))
        return len(lines) - len(kept)

    def has_evaluation(self, step: int) -> bool:
        """Whether there is a line of an evaluation of `step`."""
        if not self.run.metrics.exists():
            return False
        lines = self.run.metrics.read_bytes().splitlines()
        # The last lines alone: what comes after `step` has been dropped.
        return any(line.startswith(b'{"step": %d,' % step) and b'"eval/' in line for line in lines[-2:])

    def lost_after(self, step: int) -> dict[str, Any]:
        """What an earlier life did after `step` and this one will do again, as fields of the event of its resume.

        lost_steps, lost_s: steps and their seconds, of which of a line that began before `step` only the part after it;
        lost_until: the time of the last such line, absent where there is none. Ask before `truncate_after`.
        """
        lines = self.run.metrics.read_bytes().splitlines() if self.run.metrics.exists() else []
        lost_steps, lost_s, before = 0, 0.0, 0
        until: str | None = None
        for text in lines:
            try:
                line = json.loads(text)
                own = int(line["step"])
                taken, seconds = int(line.get("steps", own - before)), float(line.get("step_s") or 0.0)
                if own > step:
                    until = str(line["time"])
                if "step_s" in line:
                    repeated = max(0, min(taken, own - step))
                    lost_steps, lost_s, before = lost_steps + repeated, lost_s + repeated * seconds, own
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        return {"lost_steps": lost_steps, "lost_s": round(lost_s, 3), **({"lost_until": until} if until else {})}

    def close(self) -> None:
        """Finish the wandb copy. The files need no closing."""
        if self._wandb is not None:
            try:
                self._wandb.finish()
            except Exception as error:
                self._give_up_wandb(error)
            self._wandb = None

    def _start_wandb(self, log: LogConfig, run_id: str) -> None:
        try:
            import wandb

            self._wandb = wandb.init(
                project=log.wandb_project,
                id=run_id,
                name=self.run.path.name,
                dir=str(self.run.path.resolve()),
                mode=log.wandb,
                resume="allow",
                config=yaml.safe_load(self.run.config.read_text(encoding="utf-8")),
                settings=wandb.Settings(console="off", silent=True, **_patience(wandb.Settings)),
            )
            # Steps repeat after a resume from an older checkpoint; wandb's own step may only grow.
            self._wandb.define_metric("*", step_metric="step")
        except Exception as error:
            self._give_up_wandb(error)

    def _give_up_wandb(self, error: Exception) -> None:
        """A copy is never a reason to stop, whatever is wrong with it; say so once and go on without it."""
        self._wandb = None
        said = " ".join(f"{type(error).__name__}: {error}".split())
        self.event("wandb_lost", error=said)
        _LOGGER.warning(
            "The wandb copy of this run ends here (%s); metrics.jsonl goes on. log.wandb=disabled silences this.", said
        )


def _patience(settings: Any) -> dict[str, float]:
    known = getattr(settings, "model_fields", {})
    return {name: seconds for name, seconds in _WANDB_SECONDS.items() if name in known}


def _finite(values: Mapping[str, Value]) -> tuple[dict[str, Any], dict[str, str]]:
    """`values` with null for what is not finite, and what those values were (`name` or `name[index]`)."""
    finite: dict[str, Any] = {}
    nonfinite: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Sequence):
            finite[name] = [number if math.isfinite(number) else None for number in value]
            nonfinite |= {f"{name}[{i}]": str(number) for i, number in enumerate(value) if not math.isfinite(number)}
        elif math.isfinite(value):
            finite[name] = value
        else:
            finite[name], nonfinite[name] = None, str(value)
    return finite, nonfinite


def _flat(values: Mapping[str, Value]) -> dict[str, float]:
    """One number per name, as wandb draws them: `load` of three layers becomes load/0, load/1, load/2."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Sequence):
            flat |= {f"{name}/{index}": number for index, number in enumerate(value)}
        else:
            flat[name] = value
    return flat


def _is_up_to(line: bytes, step: int) -> bool:
    found = (parse_line(line) or {}).get("step")
    return line.endswith(b"\n") and isinstance(found, int) and found <= step


def _is_full(error: DiskError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT)
