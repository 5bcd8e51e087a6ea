"""Stop requests: real signals sent to a real process, and the stop file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from rxt_dist.errors import ExitCode
from rxt_dist.lives import file_identity
from rxt_dist.train.signals import StopRequest

# Says that it is ready, "trains" until asked to stop, "saves" until its input ends, which is when all signals have been
# sent, then shows that the handlers are back to what they were.
TRAINING = """
import signal, sys, time
from pathlib import Path
from rxt_dist.train.signals import StopRequest

before = signal.getsignal(signal.SIGTERM)
with StopRequest(Path(sys.argv[1])) as stop:
    print("ready", flush=True)
    while stop.reason is None:
        time.sleep(0.01)
    sys.stdin.read()
    print("saved", stop.reason, signal.getsignal(signal.SIGTERM) == before, flush=True)
print(signal.getsignal(signal.SIGTERM) == before, flush=True)
"""


def train(stop_file: Path, variables: Mapping[str, str] = MappingProxyType({})) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(stop_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)} | variables,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_a_signal_is_a_request_and_repeats_are_harmless(tmp_path: Path, number: signal.Signals) -> None:
    process = train(tmp_path / "STOP")
    process.send_signal(number)
    for again in (number, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(again)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    saved, restored = out.splitlines()
    assert saved.startswith("saved SIG")
    assert saved.endswith("False")
    assert restored == "True"


def test_the_first_signal_is_the_reason(tmp_path: Path) -> None:
    with StopRequest(tmp_path / "STOP") as stop:
        assert stop.reason is None
        assert stop.reason is None
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason is not None
        assert stop.reason == "SIGUSR2"


@pytest.mark.parametrize("watched", [False, True])
def test_a_second_signal_ends_at_once_unless_it_is_the_launchers(tmp_path: Path, watched: bool) -> None:
    process = train(tmp_path / "STOP", {"RXT_LIFE": "a"} if watched else {})
    process.send_signal(signal.SIGTERM)
    time.sleep(1.2)
    process.send_signal(signal.SIGTERM)
    if watched:
        assert process.communicate(timeout=60)[0].startswith("saved SIGTERM")
        assert process.returncode == 0
    else:
        assert process.wait(60) == -signal.SIGTERM


def test_a_run_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path / "STOP") as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason is None
    finally:
        signal.signal(signal.SIGHUP, previous)


def test_a_stop_file_is_a_persons_wish(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    with StopRequest(stop_file) as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.reason, stop.code) == ("SIGTERM", ExitCode.PREEMPTED)
        stop_file.touch()
        assert (stop.reason, stop.code) == (f"stop file {stop_file}", ExitCode.STOPPED)
        assert StopRequest(stop_file, looks=False, old_stop="").reason is None, "rank 0 looks for all"


def test_only_the_stop_file_of_an_earlier_life_is_cleared(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    stop_file.touch()
    stop = StopRequest(stop_file)
    assert stop.reason is None
    stop.clear_file()
    assert not stop_file.exists()
    stop_file.touch()
    os.utime(stop_file, ns=(7, 7))
    assert stop.reason == f"stop file {stop_file}"
    stop.clear_file()
    assert stop_file.exists(), "made after the launch began: while ranks imported, or between two lives"


def test_a_folder_that_asked_for_a_stop_is_cleared_too(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    stop_file.mkdir()
    assert StopRequest(stop_file, old_stop="").code == ExitCode.STOPPED
    StopRequest(stop_file).clear_file()
    assert not stop_file.exists()
    stop_file.symlink_to(tmp_path)
    StopRequest(stop_file).clear_file()
    assert not stop_file.is_symlink()
    assert tmp_path.is_dir()


def test_a_stop_file_that_is_touched_again_is_a_new_request(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    stop_file.touch()
    launched = file_identity(stop_file)
    os.utime(stop_file, ns=(7, 7))
    stop = StopRequest(stop_file, old_stop=launched)
    stop.clear_file()
    assert stop.code == ExitCode.STOPPED
    # Of a launch that began without one.
    assert StopRequest(stop_file, old_stop="").code == ExitCode.STOPPED


def test_a_request_of_the_launcher_counts_as_its_signal_does(tmp_path: Path) -> None:
    """It is not lost on a rank that still imports."""
    request = tmp_path / "stop"
    first, second = (StopRequest(tmp_path / "STOP", looks, request=request) for looks in (True, False))
    assert first.reason is None
    request.touch()
    assert (first.reason, first.code) == ("the launcher's request", ExitCode.PREEMPTED)
    assert second.reason is None, "rank 0 looks at files for all"
    (tmp_path / "STOP").touch()
    assert first.code == ExitCode.STOPPED


def test_handlers_are_restored_when_training_fails(tmp_path: Path) -> None:
    def mine(*_: object) -> None: ...

    previous = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(RuntimeError), StopRequest(tmp_path / "STOP"):
            raise RuntimeError
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, previous)
