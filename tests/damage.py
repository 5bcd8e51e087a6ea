"""What disks and networks do to files."""

from __future__ import annotations

from pathlib import Path


def flip_a_bit(path: Path, at: int | None = None) -> None:
    """Another bit in byte `at`, or in the middle of the file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)
