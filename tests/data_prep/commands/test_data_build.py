from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_verbs import as_json, run
from typer.testing import Result

from data_prep.building.workers import Progress
from data_prep.commands.common import describe
from data_prep.synthetic import write_sample
from data_prep.units import Unit
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
        (("FILE", "--out", "my data"), "data.yaml 'path=my data'`."),
        (
            ("FILE", "build.unit_mb=1", "--vocab-size", 300, "--eval-fraction", 0.1, "--out", "x"),
            "data.yaml build.unit_mb=1 path=x build.vocab_size=300 build.eval_fraction=0.1`.",
        ),
        (("FILE", "--seq-len", 64, "--tokenizer", "t.json"), "so --tokenizer, --seq-len cannot be given too"),
        (("FILE", "--seq-len", 64, "--tokenizer", "t.json"), "data.yaml build.tokenizer=t.json seq_len=64`."),
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


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Good, short, equal, broken and foreign files; some tell their language, some do not."""
    root = tmp_path / "mixed"
    (root / "pl").mkdir(parents=True)
    english = "The heron is a large bird that lives near the water, and it feeds on fish and frogs."
    (root / "a.txt").write_text(english)
    (root / "b.txt").write_text(english)
    (root / "c.txt").write_text("Short.")
    (root / "d.txt").write_bytes(b"\x80\xff\xfd" * 50)
    (root / "pl" / "e.txt").write_text(english + " This stands in a folder that says otherwise.")
    (root / "f.md").write_text(english)
    path = tmp_path / "mixed.yaml"
    build = {
        "sources": [{"name": "all", "inputs": [str(root)]}],
        "vocab_size": 5000,
        "clean": {"min_characters": 20, "exact_duplicates": True},
    }
    path.write_text(yaml.safe_dump({"path": str(tmp_path / "out"), "seq_len": 64, "build": build}))
    return path


def test_the_summary_says_what_was_dropped_passed_over_and_guessed(mixed: Path) -> None:
    for _ in range(2):  # the second finds all units finished, and says the same
        value = _json(mixed, "--workers", 1)
        assert value["clean"]["documents"] == 4
        assert value["clean"]["kept"] == 2
        assert value["clean"]["dropped"] == {"too_short": 1, "exact_duplicate": 1}
        assert "samples" not in value["clean"]["sources"]["all"]
        assert value["read"]["not_text_in"] == {"all/mixed/d.txt": 1}
        assert value["read"]["guessed"] == {"en": 2, "und": 1}
        assert value["passed_over"] == ["Passing over 1 file of formats that are not read: 1 .md"]
        assert value["vocab_size"] < value["vocab_size_wanted"] == 5000
    shown = " ".join(_run(mixed, "--workers", 1).stdout.split())
    for sentence in (
        "Filters and duplicates dropped 2 of 4 documents (50.00 %):",
        "too_short ┃ exact_duplicate",
        "Not text, by file and number of documents: all/mixed/d.txt (1).",
        "The language of 3 documents, which no tag, file or folder names, was guessed from their text: 2 en, 1 und.",
        "Passing over 1 file of formats that are not read: 1 .md",
        f"The text is too small for 5000 ids: the tokenizer has {value['vocab_size']}",
    ):
        assert sentence in shown


def test_without_filters_nothing_is_said_of_them(file: Path) -> None:
    assert _json(file, "--workers", 1)["clean"] is None
    assert "Filters" not in _run(file, "--workers", 1).stdout


def test_a_tokenizer_that_comes_out_smaller_is_told_when_it_is_trained(mixed: Path) -> None:
    result = _run(mixed, "--workers", 1)
    assert "The text is too small for 5000 ids" in result.stderr


def test_the_default_vocabulary_stands_in_the_help() -> None:
    for verb in ("build", "tokenizer"):
        shown = " ".join(run(verb, "--help").stdout.replace("│", " ").split())
        assert "default: (4096" in shown


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
