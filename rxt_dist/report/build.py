"""A report of one run or several as files: report.html and report/*.png. Of a run nothing else is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rxt_dist.files import access_errors, write_atomic
from rxt_dist.report.catalogue import NAMES, pictures_of
from rxt_dist.report.goodput import measure
from rxt_dist.report.page import page, time_left
from rxt_dist.report.records import RunFiles
from rxt_dist.report.series import RunSeries


def read_series(paths: Sequence[Path], now: float) -> list[RunSeries]:
    """The runs in these folders, each by a name of its own.

    Raises:
        ConfigError: one is no folder of a run, or cannot be read.
        DiskError: its disk fails.
    """
    files = [RunFiles(path) for path in paths]
    names = [one.name for one in files]
    own = [name if names.count(name) == 1 else str(one.path) for name, one in zip(names, files, strict=True)]
    # The same folder twice is two runs that are equal.
    unique = [name if own.count(name) == 1 else f"{name} ({at})" for at, name in enumerate(own, 1)]
    return [RunSeries(one, name, measure(one, now)) for name, one in zip(unique, files, strict=True)]


def write_report(runs: Sequence[RunSeries], out: Path, now: float) -> Path:
    """Write report.html and report/*.png into a folder; the path of the page. Pictures of an earlier report go.

    Raises:
        ConfigError, DiskError: it cannot be written.
    """
    folder = out / "report"
    with access_errors(out):
        folder.mkdir(parents=True, exist_ok=True)
        pictures = list(pictures_of(runs))
        for picture in pictures:
            write_atomic(folder / f"{picture.name}.png", picture.png)
        for name in set(NAMES) - {picture.name for picture in pictures}:
            (folder / f"{name}.png").unlink(missing_ok=True)
        write_atomic(out / "report.html", page(runs, pictures, now))
    return out / "report.html"


def as_json(runs: Sequence[RunSeries]) -> list[dict[str, Any]]:
    """What `--json` prints of each run: where its time went, its last figures, its events by kind."""
    return [_as_json(run) for run in runs]


def _as_json(run: RunSeries) -> dict[str, Any]:
    training, evaluations = run.files.training, run.files.evaluations
    last = {name: training.last(name) for name in training.names if name != "time"}
    last |= {name: evaluations.last(name) for name in evaluations.names if name.startswith("eval/")}
    events: dict[str, int] = {}
    for event in run.files.events:
        events[event["kind"]] = events.get(event["kind"], 0) + 1
    left = time_left(run)
    return {
        "run": str(run.files.path),
        "goodput": run.goodput.as_json(),
        "seconds_left": round(left, 1) if left == left else None,
        "last": {name: value if value == value else None for name, value in last.items()},
        "events": events,
    }
