"""A rank as SLURM starts it: who it is, what surrounds it, and what it leaves behind whatever ends it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import task
from launch.slurm.task import check_numbers, rank_numbers, read_exits, set_surroundings

ROOT = Path(__file__).parents[3]
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    # Of the job, where they may be others.
    "SLURM_NTASKS": "16",
}
# A rank that does what a word says, in place of training.
RANK = """
import os, signal, sys, time
from pathlib import Path
from launch.slurm import task
def be(module, arguments):
    word = arguments[0]
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "speak":
        print("said by", os.environ["RANK"], flush=True)
    if word == "sleep":
        time.sleep(60)
    return int(arguments[1]) if len(arguments) > 1 else 0
task._be = be
task._GRACE_SECONDS = 0.3
sys.exit(task._watched_rank(Path(sys.argv[1]), "gpu07", sys.argv[2:]))
"""


def rank(folder: Path, *words: object, number: int = 0) -> subprocess.Popen[bytes]:
    environment = os.environ | {"RANK": str(number), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANK, str(folder), *map(str, words)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)


def test_a_rank_is_who_its_step_says() -> None:
    numbers = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert rank_numbers(SRUN) == numbers
    assert check_numbers(SRUN) == {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    assert rank_numbers(SRUN | {"TORCHELASTIC_RUN_ID": "none"}) == {}, "torchrun has said it"


def test_what_the_site_has_set_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "interface_towards", lambda own, hosts: "eth7" if hosts == ["a", "b"] else None)
    environ: dict[str, str] = {
        "RXT_HOSTS": "a,b",
        "NCCL_SOCKET_IFNAME": "ib0",
        "SLURM_JOB_ID": "9",
    }
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    set_surroundings(environ, "a", 4)
    assert environ["GLOO_SOCKET_IFNAME"] == "eth7"
    assert environ["NCCL_SOCKET_IFNAME"] == "ib0"
    assert environ["OMP_NUM_THREADS"] == "4"
    del environ["NCCL_SOCKET_IFNAME"]
    set_surroundings(environ, "a", 4)
    assert environ["NCCL_SOCKET_IFNAME"] == "=eth7"
    assert Path(environ["TRITON_CACHE_DIR"]).parent.name == f"rxt-{os.getuid()}-9"


def test_caches_lie_where_this_node_has_room_and_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A job inherits TMPDIR of the machine that submitted it.
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("TMPDIR", "/no/such/folder")
    environ = {"SLURM_JOB_ID": "9", "TMPDIR": "/no/such/folder"}
    set_surroundings(environ, "a", 1)
    assert environ["TRITON_CACHE_DIR"].startswith(("/tmp/", "/var/tmp/"))
    shutil.rmtree(Path(environ["TRITON_CACHE_DIR"]).parent)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    known = tmp_path / f"rxt-{os.getuid()}-9"
    set_surroundings(environ := {"SLURM_JOB_ID": "9"}, "a", 1)
    assert environ["TRITON_CACHE_DIR"] == f"{known}/triton"
    assert known.stat().st_mode & 0o777 == 0o700
    # Its name can be guessed: what another user has put there is not used, for code is loaded from it.
    known.chmod(0o777)
    set_surroundings(environ := {"SLURM_JOB_ID": "9"}, "a", 1)
    own = Path(environ["TRITON_CACHE_DIR"]).parent
    assert (own != known, own.stat().st_mode & 0o777) == (True, 0o700)
    known.rmdir()
    known.symlink_to(own)
    set_surroundings(environ := {"SLURM_JOB_ID": "9"}, "a", 1)
    assert Path(environ["TRITON_CACHE_DIR"]).parent not in (known, own)


@pytest.mark.parametrize("code", [0, 75, 76])
def test_an_end_that_all_have_agreed_on_is_no_failure_to_srun(tmp_path: Path, code: int) -> None:
    assert rank(tmp_path, "end", code).wait(20) == 0
    assert read_exits(tmp_path, 2)[0]["code"] == code


def test_a_failure_and_a_kill_are_told_with_their_host(tmp_path: Path) -> None:
    processes = [rank(tmp_path, "end", 65), rank(tmp_path, "die", number=1)]
    assert [process.wait(20) for process in processes] == [65, 137]
    exits: dict[int, dict[str, Any]] = read_exits(tmp_path, 3)
    assert {number: (how["code"], how["host"]) for number, how in exits.items()} == {
        0: (65, "gpu07"),
        1: (-signal.SIGKILL, "gpu07"),
    }


def test_only_the_first_rank_speaks_into_the_output_of_the_job(tmp_path: Path) -> None:
    processes = [rank(tmp_path, "speak", number=number) for number in (0, 1)]
    assert [process.communicate(timeout=20)[0] for process in processes] == [b"said by 0\n", b""]
    assert (tmp_path / "output-1").read_text() == "said by 1\n"


def test_a_rank_dies_with_its_watcher(tmp_path: Path) -> None:
    process = rank(tmp_path, "sleep")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 20
    while not children.read_text().split():
        assert time.monotonic() < end
        time.sleep(0.01)
    (child,) = children.read_text().split()
    process.kill()
    process.wait()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_job_starts_without_what_only_a_launch_needs() -> None:
    """It is a second of every start, on every node."""
    modules = "launch.slurm.supervisor, launch.slurm.task, launch.slurm.data_task"
    code = f"import sys, {modules}; assert not {{'pydantic', 'typer', 'yaml', 'torch'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_torn_words_of_a_rank_are_nothing(tmp_path: Path) -> None:
    (tmp_path / "exit-0").write_text('{"code": 1')
    (tmp_path / "exit-1").write_text(json.dumps({"code": 1, "host": "a", "at": 0.0}))
    assert list(read_exits(tmp_path, 2)) == [1]
