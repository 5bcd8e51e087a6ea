"""All ranks of a run on this machine: one process each, signals passed on, one exit code for all.

A rank starts with the stop signals (TERM, USR1, USR2) ignored, because each would kill it while it imports; the trainer
installs handlers as soon as it can. So that no request is lost meanwhile, a stop signal that this process gets is
repeated every second until the ranks have ended; for the trainer a repeated signal is the same wish.
"""

from __future__ import annotations

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rxt_dist.errors import ExitCode, may_start_again
from rxt_dist.ranks import free_port

GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.05
_REPEAT_SECONDS = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class _Received:
    """Signals that this process got; handlers only note them, the main loop passes them on."""

    stop: int | None = None
    interrupts: int = 0
    interrupts_passed: int = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if number == signal.SIGINT:
            self.interrupts += 1
        else:
            self.stop = number


def launch(command: Sequence[str], ranks: int, resume_attempts: int = 0, grace_seconds: float = GRACE_SECONDS) -> int:
    """Run `command` as `ranks` ranks until all have ended, and again after a preemption or a crash.

    Args:
        command: what each rank executes; rank facts reach it by torchrun's environment variables.
        ranks: how many.
        resume_attempts: how often to start all ranks again after exit code 75 or a crash; never after a signal to this
            process itself.
        grace_seconds: how long the other ranks live on after one has failed.

    Returns:
        The exit code of the last life: 75 if a rank says preempted, else the first bad one, else 0.
    """
    with _signals_noted() as received:
        code = _one_life(command, ranks, grace_seconds, received)
        for attempt in range(1, resume_attempts + 1):
            # Whoever signals the launcher wants the run to stop; a scheduler that stops ranks does not.
            if not may_start_again(code) or received.interrupts or received.stop:
                break
            print(f"ranks ended with exit code {code}; starting again ({attempt} of {resume_attempts})", flush=True)
            code = _one_life(command, ranks, grace_seconds, received)
    return code


@contextmanager
def _signals_noted() -> Iterator[_Received]:
    received = _Received()
    before = {number: signal.signal(number, received.note) for number in (*_STOP_SIGNALS, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _one_life(command: Sequence[str], ranks: int, grace_seconds: float, received: _Received) -> int:
    port, processes = free_port(), list[subprocess.Popen[bytes]]()
    try:
        for rank in range(ranks):
            environment = rank_environment(os.environ, rank, ranks, port)
            processes.append(_start(command, environment))
        return _wait(processes, grace_seconds, received)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def rank_environment(base: Mapping[str, str], rank: int, ranks: int, port: int) -> dict[str, str]:
    """The environment of one rank: torchrun's variables, its share of the cores, the CPU accelerator without a GPU."""
    environment = dict(base)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    if not _has_gpu(base):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    return environment


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _has_gpu(environment: Mapping[str, str]) -> bool:
    """Whether a GPU device exists and is not hidden; asking torch would cost its import."""
    if environment.get("CUDA_VISIBLE_DEVICES", "any") in ("", "-1"):
        return False
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    # A session of its own: Ctrl-C on the terminal reaches the ranks once, through this process.
    return subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_prepare_rank)


def _prepare_rank() -> None:
    """In the new process, before the command: ignore what would kill an import, and die with the launcher.

    Ranks that outlived a killed launcher would write into the run directory beside those of the next start.
    """
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _wait(processes: list[subprocess.Popen[bytes]], grace_seconds: float, received: _Received) -> int:
    """Wait for all ranks, passing signals on; end the others `grace_seconds` after the first failure."""
    codes: list[int] = []
    running = list(processes)
    deadline, repeat_at = math.inf, 0.0
    while running:
        now = time.monotonic()
        if received.stop and now >= repeat_at:
            _send(running, received.stop)
            repeat_at = now + _REPEAT_SECONDS
        while received.interrupts_passed < received.interrupts:
            _send(running, signal.SIGINT)
            received.interrupts_passed += 1
        codes += [_exit_code(process.returncode) for process in running if process.poll() is not None]
        running = [process for process in running if process.returncode is None]
        if any(codes):
            deadline = min(deadline, now + grace_seconds)
        if now >= deadline:
            _send(running, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)
    if ExitCode.PREEMPTED in codes:
        return ExitCode.PREEMPTED
    # A rank that says why it ended counts before those that only lost their connection to it.
    reasons = [code for code in codes if code and not may_start_again(code)]
    return next((code for code in reasons + codes if code), ExitCode.DONE)


def _send(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        process.send_signal(number)


def _exit_code(returncode: int) -> int:
    """A shell's reading: 128 + n for a process ended by signal n."""
    return returncode if returncode >= 0 else 128 - returncode
