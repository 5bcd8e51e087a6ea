"""Files of a run that are written, cut off, replaced and damaged while they are read."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from run_logs import Log, at, moment

from rxt_dist.errors import ConfigError
from rxt_dist.files import write_atomic
from rxt_dist.report.records import Figures, RunFiles, number, seconds_of


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "a-run")


def test_only_what_is_new_is_read(log: Log) -> None:
    files = RunFiles(log.line(1, 1, loss=2.0).event(1, "save", step=1).path)
    log.line(2, 2, loss=1.0).event(2, "save", step=2).raw("metrics.jsonl", '{"step": 3, "lo')
    files.refresh()
    files.refresh()
    assert list(files.training.column("step")) == [1, 2]
    assert [event["step"] for event in files.events] == [1, 2]
    log.raw("metrics.jsonl", 'ss": 0.5}\n')
    files.refresh()
    assert list(files.training.column("loss")) == [2.0, 1.0, 0.5]


def test_a_resume_replaces_the_file(log: Log) -> None:
    """What was read before is void, also when the new file has grown longer than the old one was."""
    for step in range(1, 6):
        log.line(step, step)
    files = RunFiles(log.path)
    kept = (log.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)[:2]
    write_atomic(log.path / "metrics.jsonl", b"".join(kept))
    for step in range(3, 9):
        log.line(10 + step, step, again=1)
    files.refresh()
    assert list(files.training.column("step")) == [1, 2, 3, 4, 5, 6, 7, 8]
    (log.path / "metrics.jsonl").unlink()
    files.refresh()
    assert files.training.rows == 0


def test_what_is_no_line_is_passed_over(log: Log) -> None:
    log.line(1, 1)
    for text in (
        "{",
        "[1]",
        "null",
        '"x"',
        '{"step": null}',
        '{"step": "1"}',
        "\udcff".encode("utf-8", "replace").decode(),
    ):
        log.raw("metrics.jsonl", text + "\n").raw("events.jsonl", text + "\n")
    with open(log.path / "events.jsonl", "ab") as file:
        file.write(b'\xff\xfe{"kind": "save"}\n{"kind": 7}\n' + b"[" * 100_000 + b"\n")
    log.line(2, 2).event(2, "save")
    files = RunFiles(log.path)
    assert list(files.training.column("step")) == [1, 2]
    assert [event["kind"] for event in files.events] == ["save"]


def test_figures_are_numbers_or_nan() -> None:
    figures = Figures()
    figures.add({"step": 1, "time": at(5), "load": [1.5, None], "nonfinite": {"load[1]": "inf"}, "text": "x"})
    figures.add({"step": 2, "time": 7, "loss": 10**400, "flag": True})
    figures.add({"step": 3, "loss": 1})
    assert figures.names == ["step", "time", "load[0]", "load[1]", "loss", "flag"]
    assert list(figures.column("loss"))[2:] == [1.0]
    assert [math.isnan(value) for value in figures.column("load[0]")] == [False, True, True]
    assert figures.last("load[0]") == 1.5
    assert math.isnan(figures.last("load[1]"))
    assert figures.column("time")[0] == moment(5)
    assert list(map(math.isnan, map(number, (True, "1", None, 10**400, 2)))) == [True] * 4 + [False]
    assert seconds_of("2026-03-01T12:00:00") == moment(0)


@pytest.mark.slow
def test_a_damaged_configuration_is_none(log: Log) -> None:
    for content in (b"\xff", b"a: [", b"- 1", b"&a {x: *a}", b"[" * 5000):
        (log.path / "config.resolved.yaml").write_bytes(content)
        assert RunFiles(log.path).settings == {}


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        RunFiles(tmp_path)
    with pytest.raises(ConfigError, match="File name too long"):
        RunFiles(tmp_path / ("a" * 300))
    (tmp_path / "events.jsonl").write_text("")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match="metrics"):
        RunFiles(tmp_path)
    assert os.listdir(tmp_path)
