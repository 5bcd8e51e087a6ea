"""Being asked to stop: by a signal of the scheduler, or by a file that a person or a batch script creates.

A handler only notes the request. The loop asks at every step boundary, all ranks agree, a checkpoint is committed, and
the process ends with exit code 75. The file exists because launchers do not forward every signal to their children.
"""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Whether this process was asked to stop; a context manager that catches the signals while it is open.

    Only the main thread can open it. Repeated signals change nothing: the first one is the reason.

    Args:
        stop_file: a request is also that this path exists.
    """

    def __init__(self, stop_file: Path) -> None:
        self.stop_file = stop_file
        self._signal: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signal.Signals(number).name

    @property
    def reason(self) -> str | None:
        """What asked for the stop, for the log: a signal's name or the file; None when nothing did."""
        if self._signal:
            return self._signal
        return f"stop file {self.stop_file}" if self.stop_file.exists() else None

    def clear_file(self) -> None:
        """Remove the stop file of an earlier life of the run, which would stop every requeued life at its first step.

        Rank 0 calls it once, before training begins.
        """
        self.stop_file.unlink(missing_ok=True)
