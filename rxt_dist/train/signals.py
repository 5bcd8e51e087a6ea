"""Being asked to stop: by a signal, by a file that a person creates, or because the time of the job is over.

A handler only notes the request. The loop asks at every step boundary, all ranks agree, and a checkpoint is committed.
What the scheduler wants (signals, the time limit) ends with exit code 75 and is started again; what a person asks by
the file STOP ends with 76 and is not.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from rxt_dist.errors import ExitCode
from rxt_dist.lives import ONE_REQUEST_SECONDS, STOP_SIGNALS, TIME_LIMIT, file_identity, launched_by_us
from rxt_dist.train.time_limit import TimeLimit


class StopRequest:
    """Whether this process was asked to stop; a context manager that catches the signals while it is open.

    Only the main thread can open it. A second signal more than a second after the first ends the process at once, as
    if nothing caught it; of a rank of our launcher only the launcher does that, because it repeats its signals.

    Args:
        stop_file: a request is also that this path exists.
        looks: whether this rank looks at the file and at the clock. Rank 0 does for all.
        old_stop: identity (`file_identity`) of the file that an earlier life was asked by; None: what is there now.
        limit: when the time of this life is over.
        request: a file by which the launcher asks, as it does by a signal; None: it has none.
    """

    def __init__(
        self,
        stop_file: Path,
        looks: bool = True,
        old_stop: str | None = None,
        limit: TimeLimit | None = None,
        request: Path | None = None,
    ) -> None:
        self.stop_file = stop_file
        self.limit = limit if looks else None
        self._looks = looks
        self._request = request if looks else None
        self._old_stop = file_identity(stop_file) if old_stop is None else old_stop
        self._signal: str | None = None
        self._signalled_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            # A run under nohup outlives its terminal. Our launcher ignores all of them for a rank that still imports.
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN and not _watched():
                continue
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal is None:
            self._signal, self._signalled_at = signal.Signals(number).name, now
        elif now - self._signalled_at > ONE_REQUEST_SECONDS and not _watched():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def reason(self) -> str | None:
        """What asked for the stop, for the log: the file, a signal's name or the time limit; None when nothing did.

        Ask once at every step boundary: the time limit learns from it how long a step takes.
        """
        if self._stop_file_asks():
            return f"stop file {self.stop_file}"
        if self.limit is not None and self.limit.is_near():
            return self._signal or f"{TIME_LIMIT} of {self.limit.text}"
        return self._signal or self._request_of_launcher()

    @property
    def code(self) -> ExitCode:
        """What this rank's reason ends the run with. A person's wish counts before that of a scheduler."""
        return ExitCode.STOPPED if self._stop_file_asks() else ExitCode.PREEMPTED

    def clear_file(self) -> None:
        """Remove the stop file of an earlier life, and no other: one that was made since the start is a request.

        Rank 0 calls it once, when it holds the run.
        """
        if self._old_stop and file_identity(self.stop_file) == self._old_stop:
            if self.stop_file.is_dir() and not self.stop_file.is_symlink():  # `mkdir` is a request as well.
                self.stop_file.rmdir()
            else:
                self.stop_file.unlink(missing_ok=True)

    def _request_of_launcher(self) -> str | None:
        return "the launcher's request" if self._request is not None and file_identity(self._request) else None

    def _stop_file_asks(self) -> bool:
        return self._looks and file_identity(self.stop_file) not in ("", self._old_stop)


def _watched() -> bool:
    return launched_by_us(os.environ)
