"""What some steps of one life cost: a trace of every rank, and a table of its largest costs.

Every rank is recorded. Recording slows a rank down: if only one did, the others would wait for it, and its own time in
collectives would look shorter than it is. Losses do not depend on it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from rxt_dist.config.run import RunConfig
from rxt_dist.config.schedules import steps
from rxt_dist.errors import ConfigError
from rxt_dist.files import full_disk_errors, write_atomic
from rxt_dist.stages.base import DataSource
from rxt_dist.train.reporter import Reporter

# The first step of a life fills caches and chooses kernels; in the second the profiler itself starts, which takes time.
_UNRECORDED = 2
_STEP, _OUTSIDE = "ProfilerStep*", "outside of operators (Python, waiting)"
_TABLE_ROWS, _SHOWN_ROWS, _NAME_WIDTH = 100, 10, 60


@dataclass(frozen=True)
class Recording:
    """What is to be profiled: so many steps, into this folder, by this rank, with its device."""

    steps: int
    folder: Path
    rank: int
    device: torch.device


class StepProfile:
    """The profiler of one life of a run: hears of every step, records some, and writes when they are over."""

    def __init__(self, recording: Recording, reporter: Reporter) -> None:
        self._recording = recording
        self._reporter = reporter
        self._profiler: Any = _profiler(recording)
        self._seen = 0
        self._profiler.start()

    @property
    def active(self) -> bool:
        """Whether steps are still to be recorded."""
        return self._profiler is not None

    def after_step(self, step: int) -> None:
        """A step is over; `step` is its number in the run.

        Raises:
            DiskError: the disk is full.
        """
        if self._profiler is None:
            return
        self._seen += 1
        if self._seen < _UNRECORDED + self._recording.steps:
            self._profiler.step()
            return
        profiler = self._stop()
        self._write(profiler, step)

    def close(self) -> None:
        """The life ends. Of a window that is not full nothing is kept: it would count saving and evaluating too."""
        if self._profiler is None:
            return
        self._stop()
        needed = self._recording.steps + _UNRECORDED
        self._reporter.message(f"profile: not written, because this life had {self._seen} of the {needed} steps needed")

    def _stop(self) -> Any:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return profiler

    def _write(self, profiler: Any, last: int) -> None:
        wanted = self._recording
        first = last - wanted.steps + 1
        stem = wanted.folder / f"step-{first:08d}-rank-{wanted.rank:05d}"
        table, largest = _costs(profiler, wanted.device, wanted.steps)
        heading = f"Steps {first} to {last} of rank {wanted.rank} on {wanted.device}"
        with full_disk_errors(wanted.folder), tempfile.TemporaryDirectory() as temporary:
            wanted.folder.mkdir(parents=True, exist_ok=True)
            trace = Path(temporary) / "trace.json.gz"
            profiler.export_chrome_trace(str(trace))
            write_atomic(stem.with_suffix(".trace.json.gz"), trace.read_bytes())
            write_atomic(stem.with_suffix(".costs.txt"), f"{heading}, by time of their own.\n\n{table}\n")
        self._reporter.event("profile", first=first, last=last, path=str(stem.with_suffix(".costs.txt")))
        for line in largest:
            self._reporter.message(line)


def require_steps(config: RunConfig, data: DataSource, profiled: int) -> None:
    """Refuse to profile more steps than a run has.

    Raises:
        ConfigError: with both numbers.
    """
    needed = profiled + _UNRECORDED
    there = sum(1 for _ in islice(steps(config.train, data.row_tokens), needed))
    if there < needed:
        raise ConfigError(
            f"--profile {profiled} needs {needed} steps, of which the first {_UNRECORDED} are not recorded, but this "
            f"run has only {there}. Profile fewer, or raise train.total_tokens under another name."
        )


@contextmanager
def profiling(recording: Recording, reporter: Reporter) -> Iterator[StepProfile | None]:
    """The profile of one life, if there is to be one."""
    if not recording.steps:
        yield None
        return
    profile = StepProfile(recording, reporter)
    try:
        yield profile
    finally:
        profile.close()


def _profiler(recording: Recording) -> torch.profiler.profile:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if recording.device.type == "cuda" else [])]
    schedule = torch.profiler.schedule(skip_first=1, wait=0, warmup=_UNRECORDED - 1, active=recording.steps, repeat=1)
    return torch.profiler.profile(activities=activities, schedule=schedule)


def _costs(profiler: torch.profiler.profile, device: torch.device, steps: int) -> tuple[str, list[str]]:
    """A table of the largest costs, and its first lines in short: share of all, time a step, calls a step.

    On a GPU the short lines are its kernels; the operators that started them are in the table.
    """
    averages = profiler.key_averages()
    on_gpu = device.type == "cuda"
    sort_by = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    table = averages.table(sort_by=sort_by, row_limit=_TABLE_ROWS, max_name_column_width=_NAME_WIDTH)
    if on_gpu:
        # An annotation spans the kernels within it, and would count them twice.
        kernels = [e for e in averages if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        costs = [(event.self_device_time_total, event) for event in kernels]
    else:
        costs = [(event.self_cpu_time_total, event) for event in averages]
    costs.sort(key=lambda cost: -cost[0])
    total = sum(cost for cost, _ in costs) or 1.0
    lines = [
        f"profile: {cost / total:6.1%}  {cost / steps / 1000:9.2f} ms a step  {event.count / steps:8.1f} calls a step"
        f"  {_OUTSIDE if event.key == _STEP else event.key[:_NAME_WIDTH]}"
        for cost, event in costs[:_SHOWN_ROWS]
    ]
    return str(table), lines
