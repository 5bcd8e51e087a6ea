"""Units of work that go wrong as their names say; in a module of its own, so that workers need not import pytest."""

from __future__ import annotations

import errno
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from data_prep.units import Unit
from rxt_dist.errors import DataError

Report = Callable[[int, int], None]


# What units have left in the memory of their worker.
_KEPT: list[bytes] = []


@dataclass(frozen=True)
class WriteName:
    """Writes a file a unit, in which the process stands; misbehaves where the unit's name says so."""

    out: Path

    def is_done(self, unit: Unit) -> bool:
        return (self.out / unit.name).exists()

    def open(self) -> Callable[[Unit, Report], None]:
        return self._write

    def _write(self, unit: Unit, report: Report) -> None:
        if unit.name.startswith("slow"):
            time.sleep(0.3)
        if unit.name.startswith("keep"):
            time.sleep(0.3)
            _KEPT.append(b"x" * (64 << 20))
        if unit.name.startswith("bad"):
            raise DataError(f"unit {unit.name} is bad")
        if unit.name.startswith("bug"):
            raise KeyError("a bug")
        if unit.name.startswith("oom"):
            if unit.name.endswith("server"):
                time.sleep(0.5)  # until it has forked the other worker too
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.name.startswith("safe"):
            assert sys.flags.safe_path
        if unit.name.startswith(("heap", "arrow")):
            (self.out / "units" / f".{unit.name}.json.tmp.host.1").touch()
            raise MemoryError if unit.name.startswith("heap") else pa.ArrowMemoryError("malloc of size 10 failed")
        if unit.name.startswith("torn"):
            # A pipe's message is its length and so many bytes; the process is killed in the middle of them.
            os.write(report._connection.fileno(), struct.pack("!i", 100) + b"half")  # type: ignore[attr-defined]
            os.kill(os.getpid(), signal.SIGKILL)
        if unit.name.startswith("exit"):
            os._exit(3)
        if unit.name.startswith("full"):
            (self.out / "units" / f".{unit.name}.json.tmp.host.1").touch()
            raise OSError(errno.ENOSPC, "No space left on device")
        report(unit.text_bytes, 7)
        (self.out / unit.name).write_text(str(os.getpid()))
