"""`rxt-dist checkpoint` on a run with sound, damaged and unfinished checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.commands.checkpoint import app
from rxt_dist.errors import CheckpointError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1 and 2 committed, step 3 unfinished."""
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=3)
    for step in (1, 2, 3):
        path = store.begin(step) / "model.safetensors"
        path.write_bytes(b"weights" * 1000)
        if step < 3:
            store.commit(step, [store.record(path)], {"tokens": step * 1000})
    return tmp_path / "run"


def invoke(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def damage(run_dir: Path) -> None:
    path = run_dir / "checkpoints" / "step-00000002" / "model.safetensors"
    path.write_bytes(b"Weights" * 1000)


def test_list_shows_every_folder(run_dir: Path) -> None:
    code, out = invoke("list", run_dir)
    assert code == 0
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["step-00000001", "committed"],
        ["step-00000002", "committed"],
        ["step-00000003.tmp", "unfinished"],
    ]
    assert "tokens 2,000" in out


def test_list_as_json_is_one_object(run_dir: Path) -> None:
    (run_dir / "checkpoints" / "step-00000002" / "model.safetensors").unlink()
    code, out = invoke("list", run_dir, "--json")
    checkpoints = json.loads(out)["checkpoints"]
    assert code == 0
    assert [(entry["step"], entry["committed"]) for entry in checkpoints] == [(1, True), (2, True), (3, False)]
    assert checkpoints[0]["meta"] == {"tokens": 1000}
    assert checkpoints[1]["problem"] == "model.safetensors: missing"


def test_verify_of_sound_checkpoints(run_dir: Path) -> None:
    assert invoke("verify", run_dir) == (0, "step-00000001  ok\nstep-00000002  ok\n")


def test_verify_names_the_damaged_file_and_fails(run_dir: Path) -> None:
    damage(run_dir)
    code, out = invoke("verify", run_dir)
    assert code == 65
    assert "step-00000002  DAMAGED\n    model.safetensors: damaged (sha256" in out
    assert invoke("verify", run_dir, "--step", "1")[0] == 0
    assert invoke("verify", run_dir, "--step", "2")[0] == 65


def test_verify_as_json_is_one_object(run_dir: Path) -> None:
    damage(run_dir)
    code, out = invoke("verify", run_dir, "--json")
    answer = json.loads(out)
    assert code == 65
    assert answer["ok"] is False
    assert answer["checkpoints"][0] == {"step": 1, "problems": []}
    assert "model.safetensors" in answer["checkpoints"][1]["problems"][0]


def test_an_unknown_step_or_run_is_said(run_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="no committed checkpoint of step 3; its steps are: 1, 2"):
        invoke("verify", run_dir, "--step", "3")
    with pytest.raises(CheckpointError, match="is not a run directory"):
        invoke("list", run_dir / "nothing")


def test_a_run_without_checkpoints_yet(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    assert "No checkpoints" in invoke("list", tmp_path)[1]
    assert invoke("verify", tmp_path)[0] == 0
    assert json.loads(invoke("verify", tmp_path, "--json")[1])["ok"] is True


def test_importing_the_commands_imports_nothing_heavy() -> None:
    code = "import sys, rxt_dist.commands.checkpoint; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
