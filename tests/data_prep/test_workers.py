from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path

import psutil
import pytest
from misbehaving_units import WriteName

from data_prep.building import processes, workers
from data_prep.building.workers import Progress, attempt, run_units
from data_prep.units import Unit
from rxt_dist.errors import DataError, DiskError, ExitCode, MemoryLimitError
from rxt_dist.locks import Lock, locked


@pytest.fixture
def job(tmp_path: Path) -> WriteName:
    (tmp_path / "units").mkdir()
    return WriteName(tmp_path)


def _units(*names: str) -> list[Unit]:
    return [Unit(name, (), 100) for name in names]


def _run(job: WriteName, names: list[str], processes: int, patient: bool = True) -> tuple[int, Progress]:
    progress = Progress("Working", len(names), 100 * len(names))
    return run_units(job, _units(*names), processes, progress, lambda progress: None, patient), progress


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_every_unit_is_done_once_and_counted(job: WriteName, processes: int) -> None:
    names = [f"slow{i}" for i in range(4)]
    held, progress = _run(job, names, processes)
    assert held == 0
    pids = {int((job.out / name).read_text()) for name in names}
    assert len(pids) == processes
    assert (os.getpid() in pids) == (processes == 1)
    assert (progress.done, progress.bytes, progress.tokens, progress.running) == (4, 400, 28, {})


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_the_first_error_ends_the_rest_and_keeps_what_is_finished(job: WriteName, processes: int) -> None:
    progress = Progress("Working", 4, 400)
    units = [*_units("a", "bad1"), Unit("slow1", (), 50), Unit("slow2", (), 50)]
    with pytest.raises(DataError, match="unit bad1 is bad"):
        run_units(job, units, processes, progress, lambda progress: None, True)
    assert (job.out / "a").exists() or processes == 2
    assert not (job.out / "slow2").exists()
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_bug_in_a_worker_arrives_with_its_traceback(job: WriteName) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)In a worker process:.*_write.*KeyError: 'a bug'"):
        _run(job, ["bug", "a"], 2)


@pytest.mark.parametrize("name", ["oom", "oom-server"])
def test_a_worker_killed_for_memory_is_explained(job: WriteName, name: str) -> None:
    """Alone, or with the process that forks workers, which would know its exit code."""
    with pytest.raises(MemoryLimitError, match=rf"killed while .* unit {name}, most likely for lack of memory.*fewer"):
        _run(job, [name, "a"], 2)
    assert _run(job, ["b", "c"], 2)[0] == 0, "another server takes its place"


def test_a_server_that_is_still_ending_is_waited_for(job: WriteName, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts as running, and answers nobody; the one that takes its place is as safe."""
    connect, refused = forkserver.connect_to_new_process, iter([ConnectionRefusedError(), EOFError()])

    def busy(files: list[int]) -> tuple[int, int]:
        if (error := next(refused, None)) is not None:
            server = forkserver._forkserver._forkserver_pid
            os.kill(server, signal.SIGKILL)
            os.waitid(os.P_PID, server, os.WEXITED | os.WNOWAIT)
            raise error
        return connect(files)

    monkeypatch.setattr(popen_forkserver.forkserver, "connect_to_new_process", busy)
    assert _run(job, ["safe1", "safe2"], 2)[0] == 0
    monkeypatch.setattr(workers, "_END_SECONDS", 0.3)
    monkeypatch.setattr(popen_forkserver.forkserver, "connect_to_new_process", _refuse)
    with pytest.raises(ConnectionRefusedError):
        _run(job, ["c", "d"], 2)


def _refuse(files: list[int]) -> None:
    raise ConnectionRefusedError


def test_workers_do_not_look_for_modules_in_the_current_folder(job: WriteName) -> None:
    assert _run(job, ["safe1", "safe2"], 2)[0] == 0
    assert "PYTHONSAFEPATH" not in os.environ


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["heap", "arrow"])
@pytest.mark.slow
def test_too_little_memory_is_no_fault_of_the_text(job: WriteName, processes: int, name: str) -> None:
    said = rf"not enough memory for unit {name}2? .* Finished units are kept"
    with pytest.raises(MemoryLimitError, match=said) as error:
        _run(job, [name, f"{name}2"], processes)
    assert error.value.exit_code is ExitCode.MEMORY
    assert list((job.out / "units").glob("*.tmp.*")) == []


@pytest.mark.slow
def test_a_message_that_the_end_of_a_worker_tore_is_no_bug(job: WriteName) -> None:
    with pytest.raises(MemoryLimitError, match="killed while it worked on unit torn"):
        _run(job, ["torn", "a"], 2)


@pytest.mark.slow
def test_a_worker_that_ends_by_itself_is_explained(job: WriteName) -> None:
    with pytest.raises(DataError, match="ended with exit code 3 while it worked on unit exit1"):
        _run(job, ["exit1", "a"], 2)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.slow
def test_a_full_disk_is_explained_and_leaves_no_temporary_files(job: WriteName, processes: int) -> None:
    with pytest.raises(DiskError, match=r"The disk of .* is full .* Finished units are kept"):
        _run(job, ["full", "full2"], processes)
    assert list((job.out / "units").glob("*.tmp.*")) == []


@pytest.mark.slow
@pytest.mark.parametrize(("name", "processes"), [("keep", 4), ("slow", 2)])
def test_memory_that_a_worker_began_with_does_not_count(
    name: str, processes: int, job: WriteName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "RECYCLE_BYTES", 32 << 20)
    names = [f"{name}{i}" for i in range(4)]
    _run(job, names, 2)
    assert len({(job.out / name).read_text() for name in names}) == processes


@pytest.mark.slow
def test_workers_with_too_much_memory_are_replaced(job: WriteName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "RECYCLE_BYTES", -(1 << 40))
    names = [f"slow{i}" for i in range(4)]
    _run(job, names, 2)
    assert len({(job.out / name).read_text() for name in names}) == 4
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_a_unit_that_another_process_holds_is_left_to_it(job: WriteName, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_HELD_SECONDS", 0.5)
    with open(job.out / "units" / ".b.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for processes in (1, 2):
            held, progress = _run(job, ["a", "b", "c"], processes, patient=False)
            assert (held, progress.done) == (1, 2)
            assert not (job.out / "b").exists()
    assert _run(job, ["a", "b", "c"], 1, patient=False)[0] == 0
    assert (job.out / "b").exists()


def test_a_plain_build_waits_for_a_unit_that_is_held(job: WriteName) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl,sys,time; f=open(sys.argv[1],'w'); fcntl.flock(f, fcntl.LOCK_EX);"
         "print('held', flush=True); time.sleep(0.6)", str(job.out / "units" / ".b.lock")], stdout=subprocess.PIPE
    )  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    assert _run(job, ["a", "b"], 1)[0] == 0
    assert (job.out / "b").exists()
    assert holder.wait() == 0


def test_only_leftovers_of_units_one_holds_are_removed(job: WriteName) -> None:
    mine = [
        job.out / "units" / ".a.json.tmp.host.12",
        job.out / "en" / "train" / ".a-000.arrow.tmp.host.12",
        job.out / "duplicates" / ".a.survey.tmp.12",
    ]
    others = [job.out / "en" / "train" / ".ab-000.arrow.tmp.host.12", job.out / "units" / ".b.json.tmp.host.12"]
    for path in mine + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert attempt(job, job.open(), Unit("a", (), 1), lambda text_bytes, tokens: None)
    assert [path.exists() for path in mine + others] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_the_work_is_done_and_nothing_removed(
    job: WriteName, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    leftover = job.out / "units" / ".a.json.tmp.host.12"
    leftover.touch()
    with locked(job.out / "lock") as state:
        assert state is Lock.UNSUPPORTED
    assert _run(job, ["a"], 1)[0] == 0
    assert (job.out / "a").exists()
    assert leftover.exists()


def test_another_error_of_locking_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="Input/output"), locked(tmp_path / "lock"):
        pass


def test_shared_locks_go_together_and_exclude_the_other_kind(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, shared=True) as one, locked(path, shared=True) as two, locked(path) as alone:
        assert (one, two, alone) == (Lock.TAKEN, Lock.TAKEN, Lock.BUSY)
    with locked(path) as alone, locked(path, shared=True) as one:
        assert (alone, one) == (Lock.TAKEN, Lock.BUSY)


_PARENT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_workers import WriteName, _run
if __name__ == "__main__":
    _run(WriteName(Path(sys.argv[2])), [f"slow{i}" for i in range(1000)], 2)
"""


@pytest.mark.faults
def test_workers_end_with_a_killed_parent(job: WriteName, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(_PARENT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    parent = subprocess.Popen([sys.executable, str(script), str(Path(__file__).parent), str(job.out)], env=environment)
    while not list(job.out.glob("slow*")) and parent.poll() is None:
        time.sleep(0.01)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert list(job.out.glob("slow*"))


def test_workers_are_spawned_where_a_server_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise OSError("AF_UNIX path too long")

    assert processes.worker_context().get_start_method() == "forkserver"
    monkeypatch.setattr(processes.forkserver, "ensure_running", fail)
    assert processes.worker_context().get_start_method() == "spawn"
    assert "PYTHONSAFEPATH" not in os.environ


def test_what_the_server_imports_is_there() -> None:
    program = (
        "import data_prep.building.processes as p, importlib; [importlib.import_module(name) for name in p.IMPORTED]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
