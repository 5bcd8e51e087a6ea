"""Programs of `rxt-dist train` that begin warm: forked from a process that has imported all that they need.

Imports are two of the three seconds that a tiny run takes. What a start itself does (signals during imports, ranks of a
launcher) is tested with processes of their own; all else begins here.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.building.processes import IMPORTED, worker_context

# One server forks all: the workers of builds too.
IMPORTED[:] = ["warm_imports"]


class WarmProcess:
    """As much of `subprocess.Popen` as tests of runs ask for; output goes into a file, so that nothing waits for it.

    Args:
        arguments: those of `rxt-dist`.
        environment: the whole environment of the program.
    """

    def __init__(self, arguments: list[str], environment: Mapping[str, str]) -> None:
        self.args = arguments
        with tempfile.NamedTemporaryFile(prefix="rxt-output-", delete=False) as file:
            self._output = Path(file.name)
        weakref.finalize(self, self._output.unlink, missing_ok=True)
        # The server is a new process too, and finds modules by this alone.
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))
        self._process: Any = worker_context().Process(
            target=_be, args=(arguments, dict(environment), str(self._output)), daemon=True
        )
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return self.returncode

    @property
    def output(self) -> str:
        """What it has printed so far."""
        return self._output.read_text(encoding="utf-8", errors="replace")

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.output, None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _be(arguments: list[str], environment: dict[str, str], output: str) -> None:
    """The program itself, in its own process."""
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (io.TextIOWrapper(os.fdopen(stream, "wb", 0), write_through=True) for stream in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["rxt-dist", *arguments]
    from rxt_dist.cli import main

    main()
