"""Memory of this process: how much it holds, and giving it back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_M_MMAP_THRESHOLD, _LARGE_BLOCK = -3, 1 << 20  # of glibc's malloc.h; by itself the bound would grow to 32 MiB


def resident_bytes() -> int:
    """Memory that this process holds; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def free_memory() -> None:
    """Give freed memory back to the system, as far as the allocators can."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):  # glibc has it, musl has not
        libc.malloc_trim(0)


def return_large_blocks() -> None:
    """From now on have freed blocks of 1 MiB and more given back at once."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
