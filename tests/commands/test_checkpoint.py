"""`rxt-dist checkpoint` on a run with sound, damaged and unfinished checkpoints."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.commands.checkpoint import app
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.locks import Lock, locked


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Steps 1 and 2 committed, step 3 unfinished."""
    (tmp_path / "run").mkdir()
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
    assert "step-00000002  DAMAGED\n    model.safetensors: damaged (its hash is" in out
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


def test_prune_removes_what_does_not_have_to_stay(run_dir: Path) -> None:
    store = CheckpointStore(run_dir / "checkpoints", keep=9)
    for step in (3, 4, 5):
        path = store.begin(step) / "model.safetensors"
        path.write_bytes(b"weights")
        store.commit(step, [store.record(path)], {"tokens": step * 1000})
    (store.folder(5) / "model.safetensors").write_bytes(b"Weights")
    (run_dir / "config.resolved.yaml").write_text(
        "checkpoint: {every_tokens: 1000, keep: 3, milestone_tokens: 1000, keep_best: false}"
    )
    assert "would go" not in invoke("prune", run_dir, "--dry-run")[1], "every one of them is a milestone"
    (run_dir / "config.resolved.yaml").write_text("checkpoint: {every_tokens: 1000, keep: 3}")
    code, out = invoke("prune", run_dir, "--keep", "2", "--dry-run")
    assert code == 0
    assert [line for line in out.splitlines() if "would go" in line] == [
        "step-00000001  would go",
        "step-00000002  would go",
    ]
    assert list(store.steps()) == [1, 2, 3, 4, 5]
    code, out = invoke("prune", run_dir)
    assert out.splitlines() == [
        "step-00000001  removed",
        "step-00000002  newest",
        "step-00000003  newest",
        "step-00000004  newest",
        "step-00000005  does not have to stay",
    ]


def test_prune_leaves_a_run_alone_that_is_being_trained(run_dir: Path) -> None:
    (run_dir / "config.resolved.yaml").write_text("checkpoint: {every_tokens: 1000, keep: 3}")
    for more in ((), ("--dry-run",)):
        with locked(run_dir / ".lock"), pytest.raises(ConfigError, match="is being trained"):
            invoke("prune", run_dir, *more)


def test_prune_of_what_cannot_be_written(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run needs no lock, and otherwise it is a sentence."""
    (run_dir / "config.resolved.yaml").write_text("checkpoint: {every_tokens: 1000, keep: 3}")

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    assert invoke("prune", run_dir, "--dry-run")[0] == 0
    assert not (run_dir / ".lock").exists()
    monkeypatch.setattr("rxt_dist.locks.locked", refuse)
    assert invoke("prune", run_dir, "--dry-run")[0] == 0
    with pytest.raises(ConfigError, match=r"\.lock cannot be read or written"):
        invoke("prune", run_dir)


@pytest.mark.parametrize(
    "config", [None, "checkpoint: {keep", "name: a", "checkpoint: 3", "checkpoint: {keep: x}", "[" * 9999]
)
@pytest.mark.slow
def test_a_configuration_that_says_nothing_costs_no_checkpoint(run_dir: Path, config: str | None) -> None:
    if config is not None:
        (run_dir / "config.resolved.yaml").write_text(config)
    with pytest.raises(CheckpointError, match=r"does not say which checkpoints stay"):
        invoke("prune", run_dir, "--keep", "2")
    assert len(invoke("list", run_dir)[1].splitlines()) == 3
    assert invoke("verify", run_dir)[0] == 0


def test_prune_says_where_nothing_keeps_a_training_out(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_dir / "config.resolved.yaml").write_text("checkpoint: {every_tokens: 1000, keep: 3}")
    monkeypatch.setattr("rxt_dist.locks.locked", lambda _: nullcontext(Lock.UNSUPPORTED))
    result = CliRunner().invoke(app, ["prune", str(run_dir)])
    assert "knows no locks" in result.output
    assert result.exit_code == 0


def test_list_shows_what_is_suspect_or_set_aside(run_dir: Path) -> None:
    store = CheckpointStore(run_dir / "checkpoints", keep=9)
    store.set_aside(1)
    path = store.begin(2) / "model.safetensors"
    path.write_bytes(b"weights")
    store.commit(2, [store.record(path)], {"tokens": 2000, "suspect": True})
    lines = [line.split()[:2] for line in invoke("list", run_dir)[1].splitlines()]
    assert lines[1] == ["step-00000002", "suspect"]
    assert lines[2][0].startswith("set-aside-")
    assert len(json.loads(invoke("list", run_dir, "--json")[1])["set_aside"]) == 1


def test_what_a_run_prunes_while_it_is_verified_is_not_damaged(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verify = CheckpointStore.verify

    def pruned(store: CheckpointStore, checkpoint: int, full: bool = True) -> list[str]:
        if checkpoint == 1:
            shutil.rmtree(store.folder(1))
        return verify(store, checkpoint, full)

    monkeypatch.setattr(CheckpointStore, "verify", pruned)
    code, said = invoke("verify", run_dir)
    assert code == 0
    assert said.split("\n")[:2] == ["step-00000002  ok", "step-00000001  removed meanwhile"]
