"""The verb `rxt-dist report`: what it writes, prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rxt_dist.cli import app
from rxt_dist.errors import ConfigError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs/a"
    path.mkdir(parents=True)
    line = {"step": 1, "time": "2026-03-01T12:00:00+00:00", "tokens": 512, "lr": 1e-3, "steps": 1, "step_s": 2.0}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (path / "finished.json").write_text(json.dumps({"step": 1}))
    return path


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["report", *map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout


@pytest.mark.slow
def test_a_page_and_its_pictures(run: Path, tmp_path: Path) -> None:
    assert invoke(run).strip() == str(run / "report.html")
    assert (run / "report/learning-rate.png").exists()
    assert invoke(run, run, "--out", tmp_path / "new/folder").strip() == str(tmp_path / "new/folder/report.html")


def test_json_writes_nothing(run: Path) -> None:
    (found,) = json.loads(invoke(run, "--json"))
    assert found["last"]["lr"] == 1e-3
    assert (found["goodput"]["state"], found["goodput"]["seconds"]["productive"]) == ("finished", 2.0)
    assert sorted(path.name for path in run.iterdir()) == ["finished.json", "metrics.jsonl"]


def test_json_of_half_a_character(run: Path) -> None:
    """As the events state the path of a run whose name is no UTF-8."""
    event = {"time": "2026-03-01T12:00:00+00:00", "kind": "exit", "code": 1, "reason": "runs/\udcff"}
    (run / "finished.json").unlink()
    (run / "events.jsonl").write_text(json.dumps({**event, "kind": "start"}) + "\n" + json.dumps(event) + "\n")
    (found,) = json.loads(invoke(run, "--json"))
    assert found["goodput"]["state"] == "1: runs/\udcff"


def test_a_finished_run_is_not_followed_for_long(run: Path) -> None:
    assert "finished" in invoke(run, "--follow")
    for more in ([run], ["--json"], ["--out", run]):
        with pytest.raises(ConfigError, match="one RUN"):
            invoke(run, "--follow", *more)


def test_refusals(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        invoke(tmp_path)
    (run / "report.html").mkdir()
    with pytest.raises(ConfigError, match=r"report\.html"):
        invoke(run)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        invoke(run, "--out", tmp_path / "file")
