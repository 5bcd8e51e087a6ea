"""The local launcher with ranks that are small scripts: environment, signals, failures, restarts."""

from __future__ import annotations

import errno
import json
import math
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from scripted_ranks import LAUNCH, OBEDIENT, PATIENCE, ROOT, TAKING, events, launched, script, start, wait_for

from launch import local
from launch.local import Launch, launch
from launch.ranks import Rank, rank_environment
from launch.watching import Patience
from rxt_dist.config.run import DeadlinesConfig
from rxt_dist.errors import ExitCode
from rxt_dist.lives import file_identity


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
    assert environment["GLOO_SOCKET_IFNAME"] == "lo"
    assert rank_environment({"GLOO_SOCKET_IFNAME": "eth0"}, rank=0, ranks=2, port=1)["GLOO_SOCKET_IFNAME"] == "eth0"


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP])
@pytest.mark.slow
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
@pytest.mark.slow
def test_lives_after_each_exit_code(code: int, lives: int, tmp_path: Path) -> None:
    note = f"import os, sys; open(sys.argv[1] + '/lives', 'a').write('x'); sys.exit({code})"
    assert launched(script(note, tmp_path), 1, attempts=2) == code
    assert (tmp_path / "lives").read_text() == "x" * lives


def test_nothing_starts_again_after_ctrl_c(tmp_path: Path) -> None:
    launcher = start(5, script(OBEDIENT, tmp_path))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(signal.SIGINT)
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 130
    assert "rank" not in said, "the traceback of rank 0 alone, on its terminal"


# ---------------------------------------------------------------------------------------------------------------------
# It never hangs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_stop_may_take_as_long_as_the_phases_of_a_run() -> None:
    deadlines = DeadlinesConfig(set_up=1, load=2, data=3, step=4, save=7200, evaluate=6)
    assert Patience.of(deadlines).answer == 7216 + Patience.grace
    assert Patience.of(DeadlinesConfig(save=0)).answer == math.inf


def test_ctrl_c_does_not_wait_for_a_rank_that_is_suspended(tmp_path: Path) -> None:
    """The other one ends when that is gone, like one that waits for it in an exchange."""
    code = """
import fcntl, os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
signal.signal(signal.SIGINT, signal.SIG_IGN)
while rank == 0 and not (folder / "ready1").exists():
    time.sleep(0.01)
file = open(folder / "held", "w")
if rank == 1:
    fcntl.flock(file, fcntl.LOCK_EX)
(folder / f"ready{rank}").touch()
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
fcntl.flock(file, fcntl.LOCK_EX)
sys.exit(1)
"""
    launcher = start(0, script(code, tmp_path), grace=60.0, suspended=60.0)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(signal.SIGINT)
    said = launcher.communicate(timeout=30)[1]
    assert launcher.returncode == 130
    assert "was stopped by a signal (SIGSTOP)" in said
    assert "rank 0" not in said


def test_a_rank_that_is_suspended_is_killed_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import os, signal, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
    assert launched(script(code), 2) == ExitCode.HANG
    assert "was stopped by a signal (SIGSTOP)" in (said := capfd.readouterr().err)
    assert said.count("rank 1") == 1
    assert "rank 0" not in said


DEAF = """
import os, pathlib, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
(pathlib.Path(sys.argv[1]) / ("ready" + os.environ["RANK"])).touch()
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 87), (signal.SIGINT, 130)])
def test_ranks_that_answer_no_signal_are_killed_and_named(number: signal.Signals, code: int, tmp_path: Path) -> None:
    launcher = start(0, script(DEAF, tmp_path), answer=0.5)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(number)
    said = launcher.communicate(timeout=30)[1]
    assert launcher.returncode == code
    assert "rank 0 (process " in said
    assert "rank 1 (process " in said
    assert f"did not answer {number.name} within 0.5 s" in said


def test_a_second_stop_signal_ends_all_ranks_at_once(tmp_path: Path) -> None:
    saving = OBEDIENT.replace("if asked:", "if len(asked) > 1000:")
    launcher = start(5, script(saving, tmp_path))
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    launcher.send_signal(signal.SIGTERM)
    launcher.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    assert launcher.poll() is None, "sent twice at one moment it is one request"
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(30) == 128 + signal.SIGTERM


def test_a_closed_terminal_saves_and_ends(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", LAUNCH, "0", "", json.dumps(PATIENCE), *script(OBEDIENT, tmp_path)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execv(sys.executable, arguments)
    wait_for(tmp_path / "ready0", tmp_path / "ready1")
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == ExitCode.PREEMPTED
    assert {(tmp_path / f"asked{rank}").read_text() for rank in range(2)} == {"SIGHUP"}


def test_what_cannot_be_said_changes_no_exit_code() -> None:
    command = script("import sys; sys.exit(65)")
    arguments = [sys.executable, "-c", LAUNCH, "0", "", json.dumps(PATIENCE), *command]
    nobody, terminal = os.pipe()
    os.close(nobody)
    assert subprocess.run(arguments, cwd=ROOT, stderr=terminal, stdout=terminal).returncode == 65
    os.close(terminal)


# ---------------------------------------------------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------------------------------------------------


def test_a_refused_launch_leaves_no_trace(tmp_path: Path) -> None:
    run = tmp_path / "runs/mine"
    assert launched(script("import sys; sys.exit(64)"), 2, attempts=3, run=run) == 64
    assert not run.exists()
    # Nor in a run that is in another launch's life.
    run.mkdir(parents=True)
    (run / "life.json").write_text('{"life": "another"}')
    assert launched(script("import sys; sys.exit(1)"), 2, attempts=1, run=run) == 1
    assert [path.name for path in run.iterdir()] == ["life.json"]


# ---------------------------------------------------------------------------------------------------------------------
# Starting again
# ---------------------------------------------------------------------------------------------------------------------


def lives(run: Path) -> int:
    return len((run / "lives").read_text())


def test_three_restarts_without_a_checkpoint_are_a_crash_loop(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = TAKING + "words(f'Traceback\\nValueError: number {attempt}'); sys.exit(1)"
    assert launched(script(code, tmp_path), 1, attempts=100, run=tmp_path) == ExitCode.CRASH_LOOP
    assert lives(tmp_path) == 4
    said = capfd.readouterr().err
    assert "error: 3 restarts made no new checkpoint" in said
    reasons = [f"1: rank 0 failed: ValueError: number {attempt}" for attempt in range(4)]
    assert all(f"  {reason}" in said for reason in reasons)
    assert [event["lives"] for event in events(tmp_path, "crash_loop")] == [reasons]
    assert len(events(tmp_path, "exit")) == 4


@pytest.mark.slow
def test_progress_restores_the_attempts(tmp_path: Path) -> None:
    """Five lives that each commit a checkpoint, with one attempt; then two that do not."""
    code = (
        TAKING
        + """
if attempt < 5:
    (run / f"checkpoints/step-{attempt:08d}").mkdir(parents=True)
sys.exit(1)
"""
    )
    assert launched(script(code, tmp_path), 1, attempts=1, run=tmp_path) == 1
    assert lives(tmp_path) == 6


def test_the_restarts_that_count_as_a_loop_come_after_the_last_checkpoint(tmp_path: Path) -> None:
    code = (
        TAKING
        + """
if attempt == 2:
    (run / "checkpoints/step-00000010").mkdir(parents=True)
(run / "checkpoints/step-00000099.tmp").mkdir(parents=True, exist_ok=True)
sys.exit(1)
"""
    )
    assert launched(script(code, tmp_path), 1, attempts=100, run=tmp_path) == ExitCode.CRASH_LOOP
    assert lives(tmp_path) == 6


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_step_is_progress_too(tmp_path: Path) -> None:
    """A run that went back has set the later ones aside."""
    code = (
        TAKING
        + """
old, new = run / f"checkpoints/step-{90 - attempt:08d}", run / f"checkpoints/step-{89 - attempt:08d}"
if old.exists():
    old.rename(run / f"set-aside-{attempt}")
if attempt < 6:
    new.mkdir(parents=True)
sys.exit(1)
"""
    )
    assert launched(script(code, tmp_path), 1, attempts=1, run=tmp_path) == 1
    assert lives(tmp_path) == 7


@pytest.mark.parametrize(("committed", "code"), [(True, ExitCode.PREEMPTED), (False, 1)])
def test_a_stop_between_two_lives_leaves_what_is_committed(tmp_path: Path, committed: bool, code: int) -> None:
    if committed:
        (tmp_path / "checkpoints/step-00000005").mkdir(parents=True)
    launcher = start(5, script(TAKING + "sys.exit(1)", tmp_path), tmp_path, back_off=60.0)
    wait_for(log := tmp_path / "logs/launcher.log")
    while "starting again in 60 s" not in log.read_text():
        time.sleep(0.01)
    launcher.send_signal(signal.SIGTERM)
    assert "not started again: SIGTERM" in launcher.communicate(timeout=30)[1]
    assert launcher.returncode == code
    assert lives(tmp_path) == 1


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[float] = []
    monkeypatch.setattr(local, "_wait", lambda seconds, *_: (waits.append(seconds), True)[1])
    monkeypatch.setattr(local, "CRASH_LOOP_RESTARTS", 6)
    patience = Patience(back_off=2.0, back_off_most=10.0)
    assert launch(Launch(script("import sys; sys.exit(1)"), 1, 5, tmp_path, patience=patience)) == 1
    assert waits == [2, 4, 8, 10, 10]


def test_a_stop_file_between_two_lives_is_obeyed_and_an_old_one_is_not(tmp_path: Path) -> None:
    (tmp_path / "STOP").touch()
    code = TAKING + "(run / 'old').write_text(os.environ['RXT_OLD_STOP']); sys.exit(1)"
    assert launched(script(code, tmp_path), 1, attempts=1, run=tmp_path) == 1
    assert lives(tmp_path) == 2
    assert (tmp_path / "old").read_text() == file_identity(tmp_path / "STOP")
    code = TAKING + "(run / 'STOP').unlink(); (run / 'STOP').touch(); sys.exit(1)"
    assert launched(script(code, tmp_path), 1, attempts=1, run=tmp_path) == ExitCode.STOPPED
    assert lives(tmp_path) == 3


def test_nothing_starts_again_once_the_time_is_over(tmp_path: Path) -> None:
    code = (
        TAKING
        + """
assert float(os.environ["RXT_DEADLINE"]) - float(os.environ["RXT_LAUNCHED"]) <= 0.5
time.sleep(0.6)
sys.exit(75)
"""
    )
    wanted = Launch(script(code, tmp_path), 1, 5, tmp_path, seconds=0.5, patience=Patience(back_off=0.01))
    assert launch(wanted) == ExitCode.PREEMPTED
    assert lives(tmp_path) == 1


def test_nothing_starts_again_after_a_stop_for_the_time_limit(tmp_path: Path) -> None:
    """Its lead may leave a minute, in which another life would only begin."""
    code = (
        TAKING
        + """
told = {"kind": "exit", "code": 75, "reason": "time limit of 1h", "life": life}
(run / "events.jsonl").write_text(json.dumps(told) + "\\n")
sys.exit(75)
"""
    )
    assert launched(script(code, tmp_path), 1, attempts=5, run=tmp_path) == ExitCode.PREEMPTED
    assert lives(tmp_path) == 1
    assert "ended with exit code 75: time limit of 1h" in (tmp_path / "logs/launcher.log").read_text()


def test_some_arguments_are_of_the_first_life_alone(tmp_path: Path) -> None:
    """`--from step-N` in a second life would throw away what the first has done since."""
    code = "import sys; open(sys.argv[1] + '/said', 'a').write(' '.join(sys.argv[2:]) + ';'); sys.exit(1)"
    patience = Patience(back_off=0.01)
    assert launch(Launch(script(code, tmp_path), 1, 1, once=["--from", "step-5"], patience=patience)) == 1
    assert (tmp_path / "said").read_text() == "--from step-5;;"


def test_a_life_that_never_took_the_run_is_followed_by_one_with_the_same_arguments(tmp_path: Path) -> None:
    """Else the run would go on from its newest checkpoint, and nobody would know."""
    code = """
import json, os, pathlib, sys
run, attempt, life = pathlib.Path(sys.argv[1]), int(os.environ["RXT_ATTEMPT"]), os.environ["RXT_LIFE"]
(run / "said").open("a").write(" ".join(sys.argv[2:]) + ";")
if attempt == 1:  # Dies between its taking the run and the event that says that all is done.
    (run / "life.json").write_text(json.dumps({"life": life}))
if attempt == 2:
    (run / "events.jsonl").write_text(json.dumps({"kind": "start", "life": life}) + "\\n")
sys.exit(1)
"""
    (tmp_path / "logs").mkdir()
    patience = Patience(back_off=0.01)
    wanted = Launch(script(code, tmp_path), 1, 3, tmp_path, once=["--from", "step-5"], patience=patience)
    assert launch(wanted) == ExitCode.CRASH_LOOP
    assert (tmp_path / "said").read_text() == "--from step-5;--from step-5;--from step-5;;"


def test_a_taken_port_costs_no_attempt(tmp_path: Path) -> None:
    code = (
        TAKING
        + """
(run / "ports").open("a").write(os.environ["MASTER_PORT"] + "\\n")
if len((run / "lives").read_text()) < 3:
    words("error: Rank 0 cannot listen")
    sys.exit(69)
"""
    )
    assert launched(script(code, tmp_path), 1, run=tmp_path) == 0
    assert len(set((tmp_path / "ports").read_text().split())) == 3


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


def test_ranks_that_cannot_be_started_now_are_started_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A node that has no process or file left for a moment."""
    start, tries = local.start, []

    def refuse_first(*given: Any) -> Rank:
        tries.append(given[2])
        if len(tries) == 2:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return start(*given)

    monkeypatch.setattr(local, "start", refuse_first)
    command = script("import time; time.sleep(0.1)")
    assert launched(command, 2, attempts=1) == 0
    assert tries == [0, 1, 0, 1]
    assert "ranks cannot be started (BlockingIOError" in capfd.readouterr().err


def test_a_clock_that_jumps_ends_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = local.Launch([], 1, seconds=100.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    assert not wanted.time_is_over
    assert wanted.deadline == pytest.approx(now + 86_500, abs=5)
