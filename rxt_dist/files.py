"""The one way in which this project writes, hashes and makes room for files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

from rxt_dist.errors import ConfigError, DiskError

_CHUNK_BYTES = 1 << 22


def fsync_dir(directory: Path) -> None:
    """Make the names in `directory` durable (a rename is not, until its directory is synced)."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_path(path: Path) -> Path:
    """Where this process writes what is to become `path`: hidden, beside it, and no other process's name on any host
    that shares the folder."""
    return path.with_name(f".{path.name}.tmp.{socket.gethostname()}.{os.getpid()}")


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write `content` so that `path` holds either what it held before or all of it, whatever is killed when."""
    data = content.encode() if isinstance(content, str) else content
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_atomic` of indented JSON with sorted keys, so that equal values give equal bytes."""
    write_atomic(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_CHUNK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def require_folder(path: Path) -> None:
    """Refuse, before work starts, a place where no folder is or can be made.

    Raises:
        ConfigError: a file stands there, or in the place of a folder above.
    """
    existing = path
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        where = f"{path} cannot be a folder: {existing} is a file" if existing != path else f"{path} is a file"
        raise ConfigError(f"{where}, and nothing is written over it. Name another folder.")


def require_file_place(path: Path) -> None:
    """Refuse, before work starts, a place where no file can be written.

    Raises:
        ConfigError: it is a folder, or would be below a file.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder, but a file is to be written. Name a file in it.")
    require_folder(path.parent)


def require_free_space(directory: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse before work starts when the file system of `directory` cannot hold `needed_bytes`.

    Raises:
        DiskError: with both figures, when less is free.
    """
    existing = directory
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise DiskError(
            f"{purpose} needs about {needed_bytes / 1e9:.2f} GB in {directory}, but only {free / 1e9:.2f} GB is free "
            f"there. Free some space or name a folder on another disk."
        )
