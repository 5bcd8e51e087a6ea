"""Stop requests: real signals sent to a real process, and the stop file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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


def train(stop_file: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, str(stop_file)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
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


def test_the_stop_file_is_a_request_until_cleared(tmp_path: Path) -> None:
    stop_file = tmp_path / "STOP"
    stop = StopRequest(stop_file)
    stop.clear_file()
    assert stop.reason is None
    stop_file.touch()
    assert stop.reason is not None
    assert stop.reason == f"stop file {stop_file}"
    stop.clear_file()
    assert stop.reason is None


def test_handlers_are_restored_when_training_fails(tmp_path: Path) -> None:
    def mine(*_: object) -> None: ...

    previous = signal.signal(signal.SIGUSR1, mine)
    try:
        with pytest.raises(RuntimeError), StopRequest(tmp_path / "STOP"):
            raise RuntimeError
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, previous)
