"""Locks between processes and hosts that share a folder; the system releases them however a process ends."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TextIO

_UNSUPPORTED = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}


class Lock(Enum):
    """What became of an attempt to lock."""

    TAKEN = "taken"
    BUSY = "busy"
    UNSUPPORTED = "unsupported"  # the file system knows no locks


@contextmanager
def locked(path: Path, shared: bool = False, wait: bool = False) -> Iterator[Lock]:
    """Try to hold a lock on `path` (made if missing) for the duration of the block.

    Args:
        shared: together with other holders that share it.
        wait: until it is free, instead of BUSY.
    """
    flags = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        # Readable too: over NFS a shared lock needs that.
        with open(path, "a+", encoding="utf-8") as file:
            result = _lock(file, flags)
            # Who held it may have removed the file meanwhile: a lock on that keeps nobody out.
            if result is not Lock.TAKEN or _stands_at(path, file):
                yield result
                return


def _lock(file: TextIO, flags: int) -> Lock:
    try:
        fcntl.flock(file, flags)
    except BlockingIOError:
        return Lock.BUSY
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        return Lock.UNSUPPORTED
    return Lock.TAKEN


def _stands_at(path: Path, file: TextIO) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def held(path: Path) -> bool:
    """Whether another process holds the lock on `path` for itself; False where the file system knows no locks.

    Nothing is written, so that what others own can be asked about.
    """
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    return False
