"""Memory in large pages is new, of this process alone, and begins where a disk can read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxt_dist.checkpoint.large_pages import large_pages


@pytest.mark.parametrize("size", [0, 1, 4097, 1 << 22])
def test_it_has_the_size_that_was_asked_for_and_begins_at_a_page(size: int) -> None:
    first, second = large_pages(size), large_pages(size)
    assert first.nbytes == len(first) == size
    assert not size or first.ctypes.data % (1 << 21) == 0
    first[:], second[:] = 1, 2
    assert first.sum(dtype=int) == size


def test_the_memory_is_this_process_s_own_and_in_large_pages() -> None:
    """Shared memory would let a forked process write into a checkpoint, and has small pages."""
    size = 1 << 24
    memory = large_pages(size)
    memory[:] = 1
    first = memory.ctypes.data
    lines = Path("/proc/self/smaps").read_text().split("VmFlags:")
    own = next(text for text in lines if _covers(text, first + size // 2))
    flags = lines[lines.index(own) + 1].splitlines()[0].split()
    assert "sh" not in flags
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    assert "hg" in flags or not pages.exists()


def _covers(text: str, address: int) -> bool:
    head = next(line for line in text.splitlines() if "-" in line.split()[0] and not line.split()[0].endswith(":"))
    begin, end = (int(part, 16) for part in head.split()[0].split("-"))
    return begin <= address < end
