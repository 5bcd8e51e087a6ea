"""One holder at a time; a file system without locks is not taken for another holder."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from rxt_dist.locks import Lock, held, locked


def test_one_holder_or_several_that_share(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with locked(path) as first:
        assert first is Lock.TAKEN
        with locked(path) as second, locked(path, shared=True) as third:
            assert (second, third) == (Lock.BUSY, Lock.BUSY)
    with locked(path, shared=True) as first, locked(path, shared=True) as second, locked(path) as alone:
        assert (first, second, alone) == (Lock.TAKEN, Lock.TAKEN, Lock.BUSY)
    with locked(path) as again:
        assert again is Lock.TAKEN


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_from_another_holder(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, flags: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / ".lock") as lock:
        assert lock is Lock.UNSUPPORTED


def test_any_other_error_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: object, flags: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"), locked(tmp_path / ".lock"):
        pass


def test_asking_whether_a_lock_is_held_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lock"
    assert not held(path)
    assert not path.exists()
    with locked(path):
        assert held(path)
    assert not held(path)
    with locked(path, shared=True):
        assert not held(path)

    def refuse(file: object, flags: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert not held(path)


def test_a_lock_on_a_file_that_its_holder_removed_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch that is refused removes the lock file that it made, just as another one has opened it."""
    path = tmp_path / ".lock"
    flock, removed = fcntl.flock, []

    def remove_first(file: object, flags: int) -> None:
        if not removed:
            removed.append(path.unlink())
        flock(file, flags)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(path) as first, locked(path) as second:
        assert (first, second) == (Lock.TAKEN, Lock.BUSY)
