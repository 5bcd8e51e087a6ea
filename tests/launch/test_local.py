"""The local launcher with ranks that are small scripts: environment, signals, failures, restarts."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.local import Launch, launch
from launch.ranks import rank_environment
from launch.watching import Patience
from rxt_dist.errors import ExitCode

ROOT = Path(__file__).parents[2]

# A rank that behaves like the trainer: it saves and leaves with 75 when asked to stop.
OBEDIENT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: asked.append(number))
(folder / f"ready{rank}").touch()
for _ in range(6000):
    if asked:
        (folder / f"asked{rank}").write_text(signal.Signals(asked[0]).name)
        sys.exit(75)
    time.sleep(0.01)
"""
LAUNCH = """
import sys
from pathlib import Path
from launch.local import Launch, launch
from launch.watching import Patience
patience = Patience(grace=0.5, answer=5.0, suspended=0.5, back_off=0.05)
run = Path(sys.argv[2]) if sys.argv[2] else None
sys.exit(launch(Launch(sys.argv[3:], 2, int(sys.argv[1]), run, patience=patience)))
"""


def script(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def start(attempts: int, command: list[str], run: Path | None = None) -> subprocess.Popen[str]:
    """The launcher as a process of its own, with two ranks."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(attempts), str(run or ""), *command],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def launched(command: list[str], ranks: int, attempts: int = 0, run: Path | None = None) -> int:
    """The launcher in this process, with little patience."""
    patience = Patience(grace=0.3, answer=1.0, suspended=0.3, back_off=0.01)
    return launch(Launch(command, ranks, attempts, run, patience=patience))


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"still waiting for {paths}"
        time.sleep(0.01)


def test_every_rank_gets_its_own_facts(tmp_path: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    code = f"""
import os, pathlib, sys
facts = [os.environ[name] for name in {names}]
pathlib.Path(sys.argv[1], os.environ["RANK"]).write_text(" ".join(facts))
"""
    assert launched(script(code, tmp_path), 3) == ExitCode.DONE
    facts = [(tmp_path / str(rank)).read_text().split() for rank in range(3)]
    assert [fact[:4] for fact in facts] == [[str(rank), str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len({fact[4] for fact in facts}) == 1
    assert all(int(fact[5]) >= 1 for fact in facts)


def test_what_the_user_set_stays() -> None:
    environment = rank_environment({"OMP_NUM_THREADS": "7", "CUDA_VISIBLE_DEVICES": ""}, rank=0, ranks=2, port=1)
    assert environment["OMP_NUM_THREADS"] == "7"
    assert environment["DS_ACCELERATOR"] == "cpu"


def test_a_failed_rank_ends_the_others_and_names_the_code() -> None:
    code = "import os, sys, time; sys.exit(86) if os.environ['RANK'] == '1' else time.sleep(60)"
    before = time.monotonic()
    assert launched(script(code), 2) == 86
    assert time.monotonic() - before < 45


def test_the_first_failure_counts_and_not_what_it_caused() -> None:
    code = "import os, sys, time; time.sleep(0.3 * int(os.environ['RANK'])); sys.exit(87 + int(os.environ['RANK']))"
    assert launched(script(code), 2) == 87


def test_preempted_ranks_are_not_taken_for_crashed_ones() -> None:
    code = "import os, sys, time; time.sleep(0.1 * int(os.environ['RANK'])); sys.exit([1, 75][int(os.environ['RANK'])])"
    assert launched(script(code), 2) == ExitCode.PREEMPTED


def test_a_killed_rank_has_a_shells_exit_code() -> None:
    assert launched(script("import os; os.kill(os.getpid(), 9)"), 1) == 137


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_stop_signals_reach_every_rank(number: signal.Signals, tmp_path: Path) -> None:
    launcher = start(0, script(OBEDIENT, tmp_path))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(number)
    assert launcher.wait(60) == ExitCode.PREEMPTED
    assert {(tmp_path / f"asked{rank}").read_text() for rank in range(2)} == {number.name}


def test_a_signal_during_the_imports_of_a_rank_is_not_lost(tmp_path: Path) -> None:
    importing = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'importing').touch(); time.sleep(0.5)\n"
    launcher = start(0, script(importing + OBEDIENT, tmp_path))
    wait_for(tmp_path / "importing")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == ExitCode.PREEMPTED


def test_a_preempted_run_resumes_by_itself(tmp_path: Path) -> None:
    first_life = "import pathlib, sys; sys.exit(0) if list(pathlib.Path(sys.argv[1]).glob('asked*')) else None\n"
    launcher = start(1, script(first_life + OBEDIENT, tmp_path))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    for rank in psutil.Process(launcher.pid).children():
        rank.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == ExitCode.DONE


def test_nothing_starts_again_after_a_signal_to_the_launcher(tmp_path: Path) -> None:
    launcher = start(5, script(OBEDIENT, tmp_path))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(60) == ExitCode.PREEMPTED


@pytest.mark.parametrize(("code", "lives"), [(1, 3), (75, 3), (87, 3), (64, 1), (65, 1), (76, 1), (86, 1), (0, 1)])
def test_lives_after_each_exit_code(code: int, lives: int, tmp_path: Path) -> None:
    note = f"import os, sys; open(sys.argv[1] + '/lives', 'a').write('x'); sys.exit({code})"
    assert launched(script(note, tmp_path), 1, attempts=2) == code
    assert (tmp_path / "lives").read_text() == "x" * lives


def test_nothing_starts_again_after_ctrl_c(tmp_path: Path) -> None:
    launcher = start(5, script(OBEDIENT, tmp_path))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(60) not in (ExitCode.DONE, ExitCode.PREEMPTED)


@pytest.mark.skipif(sys.platform != "linux", reason="needs the parent death signal")
def test_ranks_die_with_a_killed_launcher(tmp_path: Path) -> None:
    code = """
import os, pathlib, sys, time
pathlib.Path(sys.argv[1], "pid" + os.environ["RANK"]).write_text(str(os.getpid()))
time.sleep(60)
"""
    launcher = start(0, script(code, tmp_path))
    wait_for(tmp_path / "pid0", tmp_path / "pid1")
    time.sleep(0.1)
    pids = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its new parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
