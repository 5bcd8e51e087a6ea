"""What a launcher tells the ranks of one life of a run, by environment variables; without one, what a rank finds out.

A life is the time from one start of all ranks to their end. A run has as many as it takes.
"""

from __future__ import annotations

import os
import signal
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

_TOKEN, _LAUNCHED, _ATTEMPT = "RXT_LIFE", "RXT_LAUNCHED", "RXT_ATTEMPT"
_DEADLINE, _OLD_STOP, _LAST_WORDS = "RXT_DEADLINE", "RXT_OLD_STOP", "RXT_LAST_WORDS"
_STOP_REQUEST = "RXT_STOP_REQUEST"

# What asks a run to save and stop.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
# Schedulers and terminals send some signals twice at the same moment, to a process and to its group.
ONE_REQUEST_SECONDS = 1.0

# How the reason of a life begins that ended because its time was over.
TIME_LIMIT = "time limit"


@dataclass(frozen=True)
class Life:
    """One life of a run, as its launcher describes it.

    token: its name. launched: when its launcher began it, or this process began (seconds since the epoch). attempt: 0
    for the first of a launcher. deadline: when the launcher's time is over; None: it has no limit, or none is known
    yet. old_stop: identity of the STOP file that was there before; None: look now. last_words: where a rank writes the
    error that ends it, for the launcher to say once; None: on the terminal. stop_request: a file by which the launcher
    asks this life to save and stop, whose signals may be lost on ranks that still import; None: it sends signals alone.
    """

    token: str
    launched: float
    attempt: int = 0
    deadline: float | None = None
    old_stop: str | None = None
    last_words: Path | None = None
    stop_request: Path | None = None

    @classmethod
    def of_process(cls, environ: Mapping[str, str]) -> Self:
        """The life that this process is part of."""
        if _TOKEN not in environ:
            return cls(uuid.uuid4().hex[:12], _process_start(), int(environ.get("SLURM_RESTART_COUNT", "0")))
        deadline, words, request = (environ.get(name) for name in (_DEADLINE, _LAST_WORDS, _STOP_REQUEST))
        return cls(
            environ[_TOKEN],
            float(environ[_LAUNCHED]),
            int(environ[_ATTEMPT]),
            float(deadline) if deadline else None,
            environ[_OLD_STOP],
            Path(words) if words else None,
            Path(request) if request else None,
        )

    def environment(self) -> dict[str, str]:
        """The variables from which `of_process` reads it in a rank."""
        variables = {
            _TOKEN: self.token,
            _LAUNCHED: repr(self.launched),
            _ATTEMPT: str(self.attempt),
            _OLD_STOP: self.old_stop or "",
        }
        if self.deadline is not None:
            variables[_DEADLINE] = repr(self.deadline)
        if self.last_words is not None:
            variables[_LAST_WORDS] = str(self.last_words)
        if self.stop_request is not None:
            variables[_STOP_REQUEST] = str(self.stop_request)
        return variables


def launched_by_us(environ: Mapping[str, str]) -> bool:
    """Whether this process is a rank that our launcher watches."""
    return _TOKEN in environ


def leave_words(text: str) -> bool:
    """Leave what ends this rank where its launcher looks for it, to say it once; False where nobody looks."""
    place = os.environ.get(_LAST_WORDS)
    if not place:
        return False
    with suppress(OSError):
        Path(place).write_text(text, encoding="utf-8", errors="backslashreplace")
        return True
    return False


def old_file(path: Path, launched: float) -> str:
    """Identity of the file at `path` if it was there before a launch; empty if there is none, or a newer one."""
    try:
        return file_identity(path) if path.lstat().st_mtime < launched else ""
    except OSError:
        return ""


def file_identity(path: Path) -> str:
    """Which file stands at `path`: touched or made again it is another one. Empty where none does."""
    try:
        stat = path.lstat()
    except OSError:
        return ""
    return f"{stat.st_ino}:{stat.st_mtime_ns}"


def _process_start() -> float:
    """When this process began, in seconds since the epoch; now, where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return time.time()
    return time.time() - age
