"""The job steps of a life: which command srun gets, and the process that srun is."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launch.slurm.job import Description
from launch.slurm.task import HOSTS

# In a shell of two words, because whatever else stands before a rank would be ended by a signal while it starts.
_DEAF = ["/bin/sh", "-c", 'trap "" TERM USR1 USR2 HUP; exec "$@"', "sh"]
_NUMBERS = ("NTASKS", "NPROCS", "NTASKS_PER_NODE", "CPUS_PER_TASK", "TRES_PER_TASK")
# What a person's shell may say of every srun: how it prints, which ranks go where, which GPUs a rank sees.
_HABITS = (
    "LABELIO", "UNBUFFEREDIO", "STDINMODE", "STDOUTMODE", "STDERRMODE", "DISTRIBUTION", "DIST_PLANESIZE", "RELATIVE",
    "GPUS_PER_TASK", "NTASKS_PER_GPU", "GPU_BIND", "EXACT", "EXCLUSIVE", "IMMEDIATE", "TIMELIMIT", "REMOTE_CWD",
    "WORKING_DIR",
)  # fmt: skip
_UNSAID = frozenset(f"SLURM_{name}" for name in (*_NUMBERS, *_HABITS))
# After the first rank has ended well, the others follow within seconds.
_WAIT_SECONDS = 300
_INTERRUPT_SECONDS, _END_SECONDS = 0.9, 10.0


def step_command(wanted: Description, role: str, hosts: Sequence[str], life: Path) -> list[str]:
    """What starts one task for each rank (`rank`), or one on each host (`agent`, `check`).

    Everything is said that a step would else inherit from the job, where versions of SLURM differ in what it does.
    """
    tasks = wanted.ranks_per_node if role == "rank" else 1
    cpus = wanted.cpus_per_task * (wanted.ranks_per_node // tasks)
    return [
        "srun",
        f"--nodes={len(hosts)}",
        f"--nodelist={','.join(hosts)}",
        f"--ntasks={len(hosts) * tasks}",
        f"--ntasks-per-node={tasks}",
        # Ranks of a node follow one another.
        "--distribution=block",
        f"--cpus-per-task={cpus}",
        "--export=ALL",
        # Each node answers for itself; ranks are nothing without one another.
        f"--kill-on-bad-exit={int(role != 'check')}",
        f"--wait={_WAIT_SECONDS}",
        *wanted.srun,
        *_DEAF,
        *wanted.prefix,
        wanted.python, "-m", "launch.slurm.task", role, str(life), str(wanted.file),
    ]  # fmt: skip


def step_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the job's numbers: they are said by options, and versions of SLURM differ in whether a
    variable that says another one is passed over or fatal. And without habits that would change what a step is."""
    return {name: value for name, value in environ.items() if name not in _UNSAID}


def unreachable(hosts: Sequence[str], seconds: float) -> list[str]:
    """Hosts on which SLURM cannot start anything now. Each is asked by itself, all at one time."""
    asked = {
        host: subprocess.Popen(
            ["srun", "--nodes=1", f"--nodelist={host}", "--ntasks=1", "--cpus-per-task=1", "--overlap", "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=step_environment(os.environ),
            start_new_session=True,
        )
        for host in hosts
    }
    end, silent = time.monotonic() + seconds, []
    for host, process in asked.items():
        try:
            code: int | None = process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            code = None
        if code != 0:
            silent.append(host)
    return silent


class Step:
    """A job step that runs. Signals for the supervisor do not reach srun: it is in a session of its own.

    Args:
        listen: called with every line that its tasks print, in a thread; None: they print into the job's output.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        hosts: Sequence[str],
        listen: Callable[[str], None] | None = None,
    ) -> None:
        self._process = subprocess.Popen(
            command,
            env={**step_environment(environment), HOSTS: ",".join(hosts)},
            stdin=subprocess.DEVNULL,
            stdout=None if listen is None else subprocess.PIPE,
            start_new_session=True,
        )
        self._listen = listen
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._process.stdout or ():
            if self._listen is not None:
                self._listen(line.decode("utf-8", "replace"))

    @property
    def ended(self) -> bool:
        """Whether all its tasks have ended, and everything that they printed was heard."""
        return self._process.poll() is not None and not self._reader.is_alive()

    def pass_on(self, number: int) -> None:
        """Send a signal to all tasks."""
        self._process.send_signal(number)

    def end(self, grace: float = 0.0) -> None:
        """End it, after `grace` seconds in which it may do so itself. What stays after that SLURM ends with the job."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(grace)
            return
        # Twice within a second: srun kills its tasks, which are deaf to all else.
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
            self._process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_INTERRUPT_SECONDS if number == signal.SIGINT else _END_SECONDS)
                return
