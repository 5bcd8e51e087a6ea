"""The one way in which this project writes, hashes and makes room for files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from rxt_dist.errors import ConfigError, DiskError, UserError

T = TypeVar("T")

# What is read and hashed at once stays in a processor's cache.
_CHUNK_BYTES = 1 << 20
# What a disk does not give out is asked for again after these: to do without it may cost hours of work.
_READ_PAUSES = (1.0, 5.0)
_UNITS = (("KB", 10**3), ("MB", 10**6), ("GB", 10**9), ("TB", 10**12))

# What the system says where a person has to act. Everything else, a missing file above all, may be our own mistake and
# keeps its traceback.
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FAILING = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO}
_REFUSED = {
    errno.EACCES: "Mend its rights, or name another place",
    errno.EPERM: "Mend its rights, or name another place",
    errno.EROFS: "Name a place on a disk that can be written to",
    errno.ENOTDIR: "Name another place: a file stands where a folder is needed",
    errno.EISDIR: "Name another place: a folder stands where a file is needed",
    errno.ENAMETOOLONG: "Choose shorter names",
    errno.ELOOP: "Mend the link, which leads to itself",
    errno.EFBIG: "Name a place on a disk that can hold larger files",
}


# ---------------------------------------------------------------------------------------------------------------------
# What the system refuses
# ---------------------------------------------------------------------------------------------------------------------


def access_error(error: OSError, place: Path | None = None, kept: str = "") -> UserError | None:
    """What to tell a person of an error of the system; None where it may be a mistake of this program.

    Args:
        place: what was worked on, where the error does not name it.
        kept: a sentence about what is not lost.
    """
    where = error.filename if isinstance(error.filename, str) else place
    if error.errno is None:
        return None
    reason, kept = os.strerror(error.errno), f" {kept}" if kept else ""
    if error.errno in _FULL:
        disk = f"The disk of {place or where}" if place or where else "The disk"
        return DiskError(f"{disk} is full ({reason}).{kept} Free some space there and run the same command again.")
    what = f"{where} cannot" if where else "A file cannot"
    if error.errno in _FAILING:
        return DiskError(f"{what} be read or written ({reason}): its disk fails or is gone.{kept} Look after the disk.")
    if error.errno in _REFUSED:
        return ConfigError(f"{what} be read or written ({reason}).{kept} {_REFUSED[error.errno]}.")
    return None


@contextmanager
def access_errors(place: Path | None = None, kept: str = "") -> Iterator[None]:
    """For work in `place`: an error of the system becomes one that a person can act on, where it can be one.

    Raises:
        DiskError: the disk is full, or fails.
        ConfigError: something cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        known = access_error(error, place, kept)
        if known is None:
            raise
        raise known from error


@contextmanager
def full_disk_errors(place: Path) -> Iterator[None]:
    """For work that may be started again: of what the system refuses only a full disk ends it for good.

    Raises:
        DiskError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        known = access_error(error, place) if error.errno in _FULL else None
        if known is None:
            raise
        raise known from error


@contextmanager
def lasting_errors(folder: Path) -> Iterator[None]:
    """For work in `folder` that may be started again: what will be so the next time, too, is for a person to act on.

    A disk or handle that fails for a moment is not: that is a crash, after which another life may go well.

    Raises:
        DiskError: the disk is full, or the folder is gone.
        ConfigError: something in it cannot be read or written, for lack of rights or by the names that stand there.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FAILING:
            raise
        if error.errno == errno.ENOENT and not folder.is_dir():
            raise DiskError(f"{folder} is gone. Is its disk still mounted? Bring it back, and start again.") from error
        known = access_error(error, folder)
        if known is None:
            raise
        raise known from error


def forget_terminal() -> None:
    """Let what this process prints go nowhere from here on: whoever read it is gone.

    Else the rest of it would be refused again when the process ends, which then had an exit code for that.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    os.close(nowhere)


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


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
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_dir(path.parent)
    except OSError as error:
        # A full disk names no file, and nobody has asked for the temporary one.
        error.filename = str(path)
        del error.filename2
        raise


def write_json_atomic(path: Path, value: Any) -> None:
    """`write_atomic` of `json_bytes`."""
    write_atomic(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys, so that equal values give equal bytes."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def blake3_file(path: Path) -> str:
    """Hex blake3 of a file."""
    return _hashed(path, blake3())


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file: three times the work of blake3, where other programs must be able to compare it."""
    return _hashed(path, hashlib.sha256())


def _hashed(path: Path, digest: Any) -> str:
    """Read in blocks, each into the memory of the last: a memory map turns a failing disk into a killed process."""
    with open(path, "rb", buffering=0) as file:
        block = memoryview(bytearray(max(1, min(_CHUNK_BYTES, os.fstat(file.fileno()).st_size))))
        while count := file.readinto(block):
            digest.update(block[:count])
    return str(digest.hexdigest())


def patiently(action: Callable[[], T]) -> T:
    """What `action` reads, if need be at a third try.

    Raises:
        OSError: of the last try; at once if there is no such file.
    """
    for pause in _READ_PAUSES:
        try:
            return action()
        except FileNotFoundError:
            raise
        except OSError:
            time.sleep(pause)
    return action()


# ---------------------------------------------------------------------------------------------------------------------
# Refusing before work starts
# ---------------------------------------------------------------------------------------------------------------------


def require_folder(path: Path, file: str = "x") -> None:
    """Refuse, before work starts, a place where no folder is or can be made, or no file `file` can be written in it.

    It is tried with a file that has no name, so that nothing is left and no other process sees it.

    Raises:
        ConfigError: a file or a link to nothing stands there or in the place of a folder above, the place cannot be
            written to, or a name is too long.
        DiskError: not a single byte can be written.
    """
    existing = require_no_file(path)
    try:
        _require_name(existing / temporary_path(path / file).name)
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"x")
    except OSError as error:
        known = access_error(error, path)
        if isinstance(known, DiskError):
            raise known from error
        raise _no_place(path, error) from error


def require_no_file(path: Path) -> Path:
    """Refuse a place where a file or a link to nothing stands, or in the place of a folder above it, and one with a
    name that is too long; writes nothing.

    Returns:
        the path itself, or the nearest folder above it that is there.

    Raises:
        ConfigError: as said, or the system does not say what is there.
    """
    existing = _nearest(path)
    if not os.path.isdir(existing):
        what = "a link to nothing" if existing.is_symlink() else "a file"
        where = f"{path} cannot be a folder: {existing} is {what}" if existing != path else f"{path} is {what}"
        raise ConfigError(f"{where}, and nothing is written over it. Name another folder.")
    try:
        for name in path.parts[len(existing.parts) :]:
            _require_name(existing / name)
        _require_name(path)
    except OSError as error:
        raise _no_place(path, error) from error
    return existing


def _no_place(path: Path, error: OSError) -> ConfigError:
    advice = _REFUSED.get(error.errno or 0, "Name another place")
    return ConfigError(f"{path} cannot be written to ({error.strerror or error}). {advice}.")


def require_file_place(path: Path) -> None:
    """Refuse, before work starts, a place where no file can be written.

    Raises:
        ConfigError: it is a folder, would be below a file, or cannot be written to.
        DiskError: not a single byte can be written.
    """
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder, but a file is to be written. Name a file in it.")
    require_folder(path.parent, path.name)


def require_free_space(directory: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse before work starts when the file system of `directory` cannot hold `needed_bytes`.

    Raises:
        DiskError: with both figures, when less is free.
    """
    free = shutil.disk_usage(_nearest(directory)).free
    if free < needed_bytes:
        needed, there = distinct_sizes(needed_bytes, free)
        raise DiskError(
            f"{purpose} needs about {needed} in {directory}, but only {there} is free there. Free some space or name a "
            f"folder on another disk."
        )


def distinct_sizes(one: int, other: int) -> tuple[str, str]:
    """Two different numbers of bytes for a person: each in its own unit, with as many digits as tell them apart."""
    texts = "", ""
    for digits in range(1, 19):
        texts = _size(one, digits), _size(other, digits)
        if texts[0] != texts[1]:
            break
    return texts


def _size(size: int, digits: int) -> str:
    unit, factor = next(((unit, factor) for unit, factor in reversed(_UNITS) if size >= factor), ("bytes", 1))
    return f"{size} bytes" if factor == 1 else f"{size / factor:.{digits}f} {unit}"


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there.

    Raises:
        ConfigError: the system does not say.
    """
    for existing in (path, *path.parents):
        try:
            os.lstat(existing)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):  # met again when the folder above is looked at
                continue
            raise ConfigError(f"{existing} cannot be reached ({error.strerror}). Name another place.") from error
        return existing
    return Path()


def _require_name(path: Path) -> None:
    """Raise OSError if the file system takes no such name."""
    with suppress(FileNotFoundError):
        os.lstat(path)
