from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_verbs import as_json, run
from typer.testing import Result

from data_prep.building.workers import Progress
from data_prep.synthetic import write_sample
from data_prep.units import Unit
from rxt_dist.commands.data.build import describe
from rxt_dist.errors import ConfigError


def _run(*arguments: object) -> Result:
    return run("build", *arguments)


def _json(*arguments: object) -> dict[str, Any]:
    return as_json("build", *arguments)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_sample(tmp_path / "corpus", 60_000)
    content = {
        "path": str(tmp_path / "shards"),
        "seq_len": 64,
        "build": {
            "sources": [{"name": "all", "inputs": [str(tmp_path / "corpus")], "language": "en"}],
            "vocab_size": 400,
            "unit_mb": 0.01,
        },
    }
    path = tmp_path / "data.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_a_data_file_and_an_array_of_tasks(file: Path) -> None:
    first = _json(file, "--task", 0, "--tasks", 2, "--workers", 1)
    assert "dataset" in first
    assert "units are left to other tasks" in first["unfinished"]
    assert "root_digest" not in first
    plain = _run(file, "--task", 0, "--tasks", 2, "--workers", 1)
    assert plain.exit_code == 0
    assert "units are left to other tasks" in plain.stdout
    second = _json(file, "--task", 1, "--tasks", 2, "--workers", 1)
    assert second["units_kept"] > 0
    assert len(second["root_digest"]) == 64
    assert list(second["sources"]) == ["all"]
    assert _json(file, "--workers", 1)["root_digest"] == second["root_digest"]


def test_overrides_stand_behind_the_data_file(file: Path, tmp_path: Path) -> None:
    value = _json(file, f"path={tmp_path / 'other'}", "seq_len=32", "--workers", 1, "--backend", "tokenizers")
    assert (value["seq_len"], value["dataset"]) == (32, str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("FILE", "--out", "x"), "says how and where to build, so --out cannot"),
        (("FILE", "--seq-len", 64, "--tokenizer", "t.json"), "so --seq-len, --tokenizer cannot be given too"),
        (("FILE", "texts/"), "without other inputs: texts/ cannot stand beside it"),
        (("texts/",), "--out is missing"),
        (("texts/", "--out", "x", "--task", 1), "--task and --tasks go together"),
        (("texts/", "--out", "x", "--tasks", 4), "--task and --tasks go together"),
        (("texts/", "--out", "x", "--task", 4, "--tasks", 4), "--task is 4"),
        (("texts/", "--out", "x", "--backend", "tiktoken"), "--backend is 'tiktoken'"),
        (("FILE", "--workers", 0), "--workers is 0"),
    ],
)
def test_what_does_not_go_together_is_refused(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    result = _run(*(str(file) if item == "FILE" else item for item in arguments))
    assert isinstance(result.exception, ConfigError), result.output
    assert message in str(result.exception)
    assert sorted(tmp_path.iterdir()) == before


def test_the_progress_says_how_fast_and_how_long() -> None:
    progress = Progress("Building", 64, 50_000_000, done=12, failed=1, done_bytes=11_000_000, done_tokens=2_770_000)
    progress.started = time.monotonic() - 20
    progress.passed(Unit("u00012", (), 100_000), 60_000, 15_000)
    progress.passed(Unit("u00013", (), 100_000), 900_000, 15_000)  # never more than the plan expects of it
    line = describe(progress)
    assert line.startswith("units 12/64, 2 running, 1 failed, 0.6 MB/s, 0.14 Mtok/s, ")
    assert line.endswith(", 70 s left")
    assert "Mtok/s" not in describe(Progress("Surveying", 2, 10))


@pytest.mark.parametrize(
    ("seconds", "text_bytes", "end"),
    [
        (2.0, 50_000_000, "MB/s"),  # processes have only just started
        (60.0, 300, "MB/s"),
        (10.0, 1_000_000, ", 333 h left"),
        (100.0, 30_000_000_000, ", 5 min left"),
    ],
)
def test_the_time_that_is_left_is_told_once_there_is_a_rate(seconds: float, text_bytes: int, end: str) -> None:
    progress = Progress("Building", 64, 120_000_000_000)
    progress.started = time.monotonic() - seconds
    progress.done_bytes = text_bytes
    assert describe(progress).endswith(end)
