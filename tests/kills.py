"""SIGKILL in the middle of a program's work, whichever of test and program the machine happens to favour."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_TRIES = 20


def kill_in_the_middle(
    command: Sequence[str], environment: Mapping[str, str], out: Path, ready: Callable[[], bool]
) -> None:
    """Start a program that makes the dataset `out`, and kill it once `ready` says so.

    On a busy machine the dataset may be finished before the kill, which proves nothing: then it is removed, and the
    program starts again.
    """
    for _ in range(_TRIES):
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None and not ready():
            time.sleep(0.001)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL), f"exit code {process.returncode}"
        if process.returncode and not (out / "dataset.json").exists():
            return
        shutil.rmtree(out)
    raise AssertionError(f"{_TRIES} times the program ended before it could be killed")
