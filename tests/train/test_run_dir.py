"""Opening a run directory: new, again, and again with another configuration."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rxt_dist
from rxt_dist.errors import ConfigError, SupersededError
from rxt_dist.lives import Life
from rxt_dist.locks import Lock
from rxt_dist.train import run_dir as module
from rxt_dist.train.run_dir import RunDirectory, code_version, environment, require_checkpoint_of

CONFIG = {
    "name": "first",
    "output": "runs",
    "seed": 0,
    "model": {"dim": 64, "decoder": {"moe": {"experts": 8}}},
    "train": {"total_tokens": 1000, "micro_batch_rows": 2, "recompute": False},
    "optimizer": {"lr": 3e-4, "no_decay": ["norm", "bias"]},
    "parallel": {"zero": 1},
}


def resolved(**changes: object) -> str:
    """The configuration with dotted changes, `__` for a dot."""
    config = json.loads(json.dumps(CONFIG))
    for key, value in changes.items():
        *parents, leaf = key.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        inner[leaf] = value
    return yaml.safe_dump(config)


def opened(path: Path, resolved_yaml: str, training_hash: str = "abc", life: str = "first") -> RunDirectory:
    """A directory of which a life has taken possession, which ends with this call."""
    run = RunDirectory(path)
    run.check(resolved_yaml, training_hash)
    with run.locked():
        run.begin(resolved_yaml, training_hash, Life(life, 0.0), ranks=2)
    return run


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_directory_describes_the_run(tmp_path: Path) -> None:
    run = opened(tmp_path / "runs" / "first", resolved())
    assert yaml.safe_load(run.config.read_text()) == CONFIG
    assert run.checkpoints.is_dir()
    assert run.logs.is_dir()
    described = json.loads(run.environment.read_text())
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["code"]["version"] == rxt_dist.__version__
    assert "PyYAML" in described["packages"]
    life = json.loads(run.life.read_text())
    assert (life["life"], life["pid"], life["ranks"]) == ("first", os.getpid(), 2)
    assert life["launched"] == "1970-01-01T00:00:00.000+00:00"


def test_the_same_training_continues_with_what_may_change(tmp_path: Path) -> None:
    opened(tmp_path, resolved())
    run = opened(tmp_path, resolved(parallel__zero=3, train__micro_batch_rows=1))
    assert yaml.safe_load(run.config.read_text())["parallel"] == {"zero": 3}
    assert "parallel.zero was 1, is 3" in run.changes


def test_another_training_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    opened(tmp_path, resolved())
    before = content(tmp_path)
    changed = resolved(
        model__decoder={"moe": {"experts": 16}},
        optimizer__no_decay=["norm"],
        parallel__zero=3,
        train__micro_batch_rows=1,
    )
    with pytest.raises(ConfigError) as caught:
        opened(tmp_path, changed, "def")
    text = str(caught.value)
    assert "model.decoder.moe.experts was 8, is 16" in text
    assert "optimizer.no_decay was ['norm', 'bias'], is ['norm']" in text
    assert "zero" not in text
    assert "micro_batch_rows" not in text
    assert "name=..." in text
    assert f"remove {tmp_path}" in text
    assert content(tmp_path) == before


def test_keys_that_only_one_side_has_and_many_differences(tmp_path: Path) -> None:
    opened(tmp_path, resolved(model={"a": 1, "b": 2, "c": 3, "d": 4}))
    with pytest.raises(ConfigError, match=r"model\.dim was absent, is 64.*; and 1 more\."):
        opened(tmp_path, resolved(), "def")


def test_a_difference_outside_the_keys_is_said(tmp_path: Path) -> None:
    opened(tmp_path, resolved())
    with pytest.raises(ConfigError, match="no key, so the data or tokenizer"):
        opened(tmp_path, resolved(), "def")


@pytest.mark.parametrize("damaged", [b"a: [", b"a: \x00", b"&a [*a]"])
def test_an_unreadable_config_is_never_taken_for_the_same(tmp_path: Path, damaged: bytes) -> None:
    run = opened(tmp_path, resolved())
    run.config.write_bytes(damaged)
    with pytest.raises(ConfigError, match=r"no longer readable YAML|was absent"):
        opened(tmp_path, resolved())
    run.config.write_text("")
    with pytest.raises(ConfigError, match="was absent"):
        opened(tmp_path, resolved())


def test_a_byte_that_is_no_utf_8_is_written_over_where_the_training_is_the_same(tmp_path: Path) -> None:
    run = opened(tmp_path, resolved())
    run.config.write_bytes(run.config.read_bytes().replace(b"first", b"f\xffrst"))
    opened(tmp_path, resolved())
    assert yaml.safe_load(run.config.read_text()) == CONFIG


def test_a_directory_that_only_holds_a_launch_script_is_new(tmp_path: Path) -> None:
    (tmp_path / "launch.sbatch").write_text("#!/bin/bash\n")
    assert opened(tmp_path, resolved()).config.exists()


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    require_checkpoint_of(tmp_path, "step-00000005", {"training_hash": "abc"}, "abc")
    for meta in ({"training_hash": "other"}, {}):
        with pytest.raises(ConfigError, match=r"step-00000005 .* was written with another training configuration"):
            require_checkpoint_of(tmp_path, "step-00000005", meta, "abc")


def test_a_run_that_begins_again_is_not_finished(tmp_path: Path) -> None:
    run = opened(tmp_path, resolved())
    run.record_finish(10, 100)
    assert RunDirectory(tmp_path).finished_at(10)
    assert not opened(tmp_path, resolved(), life="second").finished_at(10)


def test_a_life_that_was_replaced_commits_nothing(tmp_path: Path) -> None:
    run = opened(tmp_path, resolved(), life="first")
    run.require_life()
    # One that looks alone has no life to lose.
    RunDirectory(tmp_path).require_life()
    opened(tmp_path, resolved(), life="second")
    assert run.is_superseded
    with pytest.raises(SupersededError, match="started again as life second"):
        run.require_life()
    run.life.unlink()
    run.require_life()


def test_environment_imports_nothing() -> None:
    code = (
        "import json, sys; from rxt_dist.train.run_dir import environment; answer = environment();"
        "print(json.dumps([answer['torch'], 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [None, False]
    import torch

    assert environment()["torch"] == torch.__version__


def test_of_two_versions_of_a_package_the_one_that_is_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packages that carry copies of others put them at the end of the path."""
    for version in ("1", "2"):
        described = tmp_path / version / f"twice-{version}.dist-info"
        described.mkdir(parents=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: twice\nVersion: {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "1"), *sys.path, str(tmp_path / "2")])
    monkeypatch.setattr(module, "_packages", module._packages.__wrapped__)
    assert environment()["packages"]["twice"] == "1"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_code_version_is_the_commit_of_its_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    package = tmp_path / "rxt_dist" / "__init__.py"
    package.parent.mkdir()
    package.write_text("")
    monkeypatch.setattr(module.rxt_dist, "__file__", str(package))
    assert code_version()["commit"] is None
    git("init", "-q")
    assert code_version()["commit"] is None
    git("add", "-A")
    git("commit", "-q", "-m", "one")
    assert code_version() == {"version": rxt_dist.__version__, "commit": git("rev-parse", "HEAD"), "modified": False}
    package.write_text("changed = True\n")
    assert code_version()["modified"] is True
    monkeypatch.setenv("PATH", "/nowhere")
    assert code_version()["commit"] is None


def test_a_second_launch_is_refused(tmp_path: Path) -> None:
    directory = opened(tmp_path / "run", resolved())
    with directory.locked() as lock:
        assert lock is Lock.TAKEN
        before = content(tmp_path)
        with pytest.raises(ConfigError, match="is being trained by another process"):
            opened(tmp_path / "run", resolved(parallel__zero=3), life="second")
        assert content(tmp_path) == before
    with directory.locked() as lock:
        assert lock is Lock.TAKEN


def test_a_launch_that_is_refused_under_the_lock_leaves_no_trace(tmp_path: Path) -> None:
    """Of a new run no folder; of one that was copied without its lock not that either."""
    for path in (tmp_path / "run", tmp_path / "copied"):
        run = RunDirectory(path)
        existed = path.name == "copied"
        if existed:
            path.mkdir()
            (path / "notes").touch()
        with pytest.raises(ConfigError, match="refused"), run.locked():
            raise ConfigError("refused")
        assert path.exists() == existed
        assert not run.lock_file.exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_not_another_process(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on, and says that nothing protects it."""
    directory = opened(tmp_path / "run", resolved())

    def refuse(file: object, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory.locked() as lock:
        assert lock is Lock.UNSUPPORTED
    said = capsys.readouterr().err
    assert f"warning: the file system of {tmp_path / 'run'} knows no locks" in said
    assert "nothing keeps a second launch out" in said


def test_a_disk_that_fails_is_not_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = opened(tmp_path / "run", resolved())

    def fail(file: object, flags: int) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Stale file handle"), directory.locked():
        pass


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "life.json", "config.resolved.yaml", "jumps.json"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ConfigError, match=rf"{name} is a pipe or a device"):
        RunDirectory(tmp_path).check(resolved(), "abc")


@pytest.mark.parametrize("name", ["checkpoints", "logs"])
def test_a_folder_whose_disk_is_away_is_not_taken_for_one_that_is_not_there_yet(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to(tmp_path / "unmounted")
    with pytest.raises(ConfigError, match=rf"{name} is a link to nothing, .* Is its disk mounted"):
        RunDirectory(tmp_path).check(resolved(), "abc")
    (tmp_path / name).unlink()
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"{name} is a file, but must be a folder"):
        RunDirectory(tmp_path).check(resolved(), "abc")
