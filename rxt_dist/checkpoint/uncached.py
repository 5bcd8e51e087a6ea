"""New files that do not pass through the system's cache of files.

Hardly anybody reads a checkpoint soon after it was written. In the cache it takes the place of the data that training
reads, and bringing it there takes time of the processors.
"""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from rxt_dist.checkpoint.large_pages import large_pages

# Written at once. A disk is handed whole pages of memory, for whole blocks of its own: both are parts of this.
_BLOCK_BYTES = 1 << 22
# What file systems say that have no such call.
_UNKNOWN_CALL = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL)


class UncachedFile:
    """A file that is written from its beginning to its end, and durable when its `with` block has ended well.

    Through the cache goes the end of the file, which fills no block, and all of it where the file system wants that.

    Args:
        path: where nothing may be.
        size: bytes that are going to be written.

    Raises:
        FileExistsError: something is at `path`.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.written = 0
        self._block = large_pages(_BLOCK_BYTES)
        self._filled = 0
        self._uncached = False
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            self._set_length(size)
            with suppress(OSError):  # It wants its cache to be used.
                self._avoid_cache(True)
        except BaseException:
            os.close(self._file)
            raise

    def write(self, content: np.ndarray) -> None:
        """Append bytes [n] (uint8)."""
        while len(content):
            part = content[: _BLOCK_BYTES - self._filled]
            self._block[self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            content = content[len(part) :]
            if self._filled == _BLOCK_BYTES:
                self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._avoid_cache(False)
                self._flush()
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def _flush(self) -> None:
        left = self._block[: self._filled].data
        while len(left):
            try:
                count = os.write(self._file, left)
            except OSError:
                # Past the cache a disk takes nothing but whole blocks, of which a limit may have cut one in two; what
                # is really wrong is met again.
                if not self._uncached:
                    raise
                self._avoid_cache(False)
                continue
            if not count:
                raise OSError(errno.EIO, f"The system takes none of {len(left)} bytes")
            left = left[count:]
            self.written += count
        self._filled = 0

    def _set_length(self, size: int) -> None:
        """Where each block makes the file longer, its length is written down with each."""
        try:
            os.ftruncate(self._file, size)
        except OSError as error:
            if error.errno not in _UNKNOWN_CALL:
                raise

    def _avoid_cache(self, avoid: bool) -> None:
        """Write past the cache from here on, or through it."""
        if hasattr(os, "O_DIRECT"):  # A matter of Linux.
            flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, flags | os.O_DIRECT if avoid else flags & ~os.O_DIRECT)
            self._uncached = avoid
