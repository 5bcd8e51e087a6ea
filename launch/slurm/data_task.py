"""The process of a job that builds a dataset, `python -m launch.slurm.data_task ROLE FOLDER WORKERS MORE`:

    build   its share of the units; MORE is the number of jobs in the array
    close   what they have left, and a verification; MORE is the dataset

A build is killed without harm: finished units stay. So a signal before the time limit ends it and requeues the job, and
one that the system has killed is tried again on the spot.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch.slurm import client
from launch.slurm.life import Signals
from launch.slurm.supervisor import job_name, say
from rxt_dist.errors import ExitCode

_TRIES = 3
_POLL_SECONDS, _END_SECONDS, _REQUEUED_SECONDS = 0.2, 10.0, 150.0


def main() -> int:
    """Build what this job has to, and after all of them verify it."""
    role, folder, workers = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    signals = Signals()
    signals.catch(signal.SIGUSR2)
    data = str(folder / "data.yaml")
    build = ["data", "build", data, "--workers", workers]
    if role == "build":
        build += ["--task", os.environ["SLURM_ARRAY_TASK_ID"], "--tasks", sys.argv[4]]
    code = run_to_the_end(build, signals)
    if code == 0 and role == "close":
        code = run_to_the_end(["data", "verify", sys.argv[4]], signals)
    return code


def run_to_the_end(arguments: Sequence[str], signals: Signals) -> int:
    """Run one command of `rxt-dist`; what it ends with, where that is not for another try."""
    for attempt in range(1, _TRIES + 1):
        process = subprocess.Popen([sys.executable, "-m", "rxt_dist", *arguments], start_new_session=True)
        while process.poll() is None and signals.user is None and signals.ended is None:
            time.sleep(_POLL_SECONDS)
        if process.returncode is None:
            _end(process)
            return _requeue(signals) if signals.ended is None else 128 + signals.ended
        if process.returncode >= 0:
            return process.returncode
        command = " ".join(arguments[:2])
        say(f"`rxt-dist {command}` was killed by signal {-process.returncode}, try {attempt} of {_TRIES}")
    return 128 - process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and its workers."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return


def _requeue(signals: Signals) -> int:
    job = job_name(dict(os.environ))
    try:
        client.requeue(job)
    except client.SlurmError as error:
        say(f"error: {error} The same `rxt-dist launch slurm-data` again goes on.")
        return ExitCode.PREEMPTED
    end = time.monotonic() + _REQUEUED_SECONDS
    while signals.ended is None and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)
    return ExitCode.PREEMPTED


if __name__ == "__main__":
    sys.exit(main())
