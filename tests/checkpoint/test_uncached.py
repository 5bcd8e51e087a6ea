"""Files that pass by the system's cache hold what others would hold, whatever the file system says to it."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rxt_dist.checkpoint import uncached
from rxt_dist.checkpoint.uncached import UncachedFile

BLOCK = 1 << 13
SIZES = (0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 3 * BLOCK + 5)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached, "_BLOCK_BYTES", BLOCK)


def content(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)


def written(path: Path, wanted: np.ndarray, piece: int = 1000) -> UncachedFile:
    with UncachedFile(path, len(wanted)) as file:
        for start in range(0, len(wanted), piece):
            file.write(wanted[start : start + piece])
    return file


def is_cached(path: Path) -> bool:
    """Whether the system has the first page of a file in memory."""
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    resident = ctypes.c_ubyte()
    start = ctypes.c_char.from_buffer(mapped)
    failed = ctypes.CDLL(None).mincore(ctypes.c_void_p(ctypes.addressof(start)), mmap.PAGESIZE, ctypes.byref(resident))
    assert not failed
    return bool(resident.value & 1)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("piece", [999, BLOCK, 10 * BLOCK])
def test_what_was_written_is_there(size: int, piece: int, tmp_path: Path) -> None:
    file = written(tmp_path / "file", content(size), piece)
    assert (tmp_path / "file").read_bytes() == content(size).tobytes()
    assert file.written == size


def test_whole_blocks_are_not_kept_in_memory(tmp_path: Path) -> None:
    plain, path = tmp_path / "plain", tmp_path / "file"
    plain.write_bytes(bytes(4 * BLOCK))
    with plain.open("rb") as file:
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if is_cached(plain):
        pytest.skip("this file system keeps all files in memory")
    written(path, content(3 * BLOCK + 5))
    assert not is_cached(path)


def refusing(real: Callable[..., Any], code: int, when: Callable[..., bool]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        if when(*arguments):
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    return call


def asks_for_direct(file: int, command: int, flags: int = 0) -> bool:
    return command == uncached.fcntl.F_SETFL and bool(flags & os.O_DIRECT)


def is_direct(file: int, _: Any) -> bool:
    return bool(uncached.fcntl.fcntl(file, uncached.fcntl.F_GETFL) & os.O_DIRECT)


@pytest.mark.parametrize("size", SIZES)
def test_a_file_system_that_wants_its_cache_used_gets_the_same_file(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncached.fcntl, "fcntl", refusing(uncached.fcntl.fcntl, errno.EINVAL, asks_for_direct))
    assert written(tmp_path / "file", content(size)).written == size
    assert (tmp_path / "file").read_bytes() == content(size).tobytes()


def test_one_that_says_so_late_gets_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def refused(file: int, content: Any) -> bool:
        asked.append(is_direct(file, content))
        return asked[-1]

    monkeypatch.setattr(uncached.os, "write", refusing(os.write, errno.EINVAL, refused))
    assert written(tmp_path / "file", content(3 * BLOCK + 5)).written == 3 * BLOCK + 5
    if not any(asked):
        pytest.skip("this file system wants its cache used at once")
    assert asked == [True] + [False] * 4, "it is asked once"
    assert (tmp_path / "file").read_bytes() == content(3 * BLOCK + 5).tobytes()


def test_a_write_that_takes_less_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(uncached.os, "write", lambda file, left: real(file, left[: BLOCK // 2 + 512]))
    assert written(tmp_path / "file", content(3 * BLOCK + 5)).written == 3 * BLOCK + 5
    assert (tmp_path / "file").read_bytes() == content(3 * BLOCK + 5).tobytes()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("size", [5, 3 * BLOCK])
def test_what_is_really_wrong_is_said(code: int, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached.os, "write", refusing(os.write, code, lambda *_: True))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=os.strerror(code)):
        written(tmp_path / "file", content(size))
    assert set(os.listdir("/proc/self/fd")) == before


def test_a_file_whose_length_is_refused_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a limit on the size of files, say."""
    monkeypatch.setattr(uncached.os, "ftruncate", refusing(os.ftruncate, errno.EFBIG, lambda *_: True))
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
        UncachedFile(tmp_path / "file", 1)
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("code", uncached._UNKNOWN_CALL)
def test_a_file_system_that_sets_no_lengths_gets_the_same_file(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncached.os, "ftruncate", refusing(os.ftruncate, code, lambda *_: True))
    written(tmp_path / "file", content(3 * BLOCK + 5))
    assert (tmp_path / "file").read_bytes() == content(3 * BLOCK + 5).tobytes()


def test_a_system_that_takes_nothing_is_not_asked_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uncached.os, "write", lambda *_: 0)
    with pytest.raises(OSError, match="takes none of 5 bytes"):
        written(tmp_path / "file", content(5))


def test_all_of_it_is_durable_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last bytes too, which go through the cache."""
    order: list[str] = []
    for name in ("write", "fsync", "close"):
        real = getattr(os, name)

        def call(*arguments: Any, name: str = name, real: Any = real) -> Any:
            order.append(name)
            return real(*arguments)

        monkeypatch.setattr(uncached.os, name, call)
    written(tmp_path / "file", content(BLOCK + 5))
    assert order == ["write", "write", "fsync", "close"]


def test_nothing_is_written_over_a_file_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("another's")
    with pytest.raises(FileExistsError):
        UncachedFile(tmp_path / "file", 1)
    assert (tmp_path / "file").read_text() == "another's"


def test_an_error_of_whoever_writes_is_the_one_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was begun is not made durable, which might fail as well."""
    monkeypatch.setattr(uncached.os, "fsync", refusing(os.fsync, errno.EIO, lambda *_: True))

    def fail() -> None:
        with UncachedFile(tmp_path / "file", 5) as file:
            file.write(content(5))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
