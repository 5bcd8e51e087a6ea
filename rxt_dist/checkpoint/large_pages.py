"""Memory in large pages."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np

_LARGE_PAGE = 1 << 21


def large_pages(size: int) -> np.ndarray:
    """New memory of this process alone, uint8 [size], that begins at a large page and has such pages where the system
    has some.

    Small ones are brought in one by one, which takes longer than what is copied into them, and a disk that reads or
    writes them is given one after another.
    """
    if not size:
        return np.empty(0, np.uint8)
    memory = mmap.mmap(-1, size + _LARGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # A matter of Linux, and of how it is set up.
        memory.madvise(mmap.MADV_HUGEPAGE)
    room = np.frombuffer(memory, np.uint8)
    first = -room.ctypes.data % _LARGE_PAGE
    return room[first : first + size]
