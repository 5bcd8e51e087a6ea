from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3

from rxt_dist import files
from rxt_dist.errors import ConfigError, DiskError, ExitCode
from rxt_dist.files import (
    access_error,
    access_errors,
    distinct_sizes,
    require_file_place,
    require_folder,
    require_free_space,
    write_atomic,
)

LONG = "x" * 300


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        (errno.ENOSPC, ExitCode.DISK, "The disk of place is full (No space left on device). Kept. Free some space"),
        (errno.EDQUOT, ExitCode.DISK, "The disk of place is full (Disk quota exceeded)"),
        (errno.EIO, ExitCode.DISK, "a/file cannot be read or written (Input/output error): its disk fails"),
        (errno.EROFS, ExitCode.CONFIG, "a/file cannot be read or written (Read-only file system). Kept. Name a place"),
        (errno.EACCES, ExitCode.CONFIG, "(Permission denied). Kept. Mend its rights"),
        (errno.ENOTDIR, ExitCode.CONFIG, "a file stands where a folder is needed"),
        (errno.ENAMETOOLONG, ExitCode.CONFIG, "Choose shorter names"),
    ],
)
def test_what_the_system_refuses_is_an_error_to_act_on(code: int, exit_code: ExitCode, said: str) -> None:
    known = access_error(OSError(code, os.strerror(code), "a/file"), Path("place"), "Kept.")
    assert known is not None
    assert known.exit_code is exit_code
    assert said in str(known)


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), OSError("library says so")])
def test_what_may_be_a_mistake_of_ours_keeps_its_traceback(error: OSError, tmp_path: Path) -> None:
    assert access_error(error, tmp_path) is None
    with pytest.raises(OSError, match=r"No such file|library") as caught, access_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, "old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, "new")
    assert str(access_error(caught.value)).startswith(f"The disk of {path} is full")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_nobody_hears_of_a_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "below", tmp_path / LONG):
        with pytest.raises(OSError, match=r"Not a dir|too long") as caught:
            write_atomic(path, "new")
        assert caught.value.filename == str(path)


@pytest.mark.parametrize("place", ["FILE", "FILE/below/it", "LINK", "LINK/below", f"{LONG}/x", f"new/{LONG}", "LOOP/x"])
def test_a_place_for_no_folder_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "FILE").touch()
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    (tmp_path / "LOOP").symlink_to(tmp_path / "LOOP")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"is a file|is a link to nothing|File name too long") as caught:
        require_folder(tmp_path / place)
    assert place in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before
    with pytest.raises(ConfigError):
        require_file_place(tmp_path / place / "file")


@pytest.mark.parametrize("place", ["/proc/rxt", "/proc", "/sys/rxt"])
def test_a_place_that_takes_no_file_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match=rf"{place} cannot be written to \(.*\)\. (Name|Mend)"):
        require_folder(Path(place))


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.EACCES, ConfigError), (errno.EROFS, ConfigError), (errno.EDQUOT, DiskError)]
)
def test_whether_a_folder_can_be_written_to_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, kind: type[Exception]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    with pytest.raises(kind):
        require_folder(tmp_path / "new" / "folder")


def test_a_good_place_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_folder(tmp_path / "new" / "folder")
    require_file_place(tmp_path / "new" / "file")
    require_file_place(tmp_path / ("x" * 100))
    monkeypatch.chdir(tmp_path)
    require_folder(Path("new"))
    require_file_place(Path("file"))
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_leaves_no_room_for_its_temporary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long"):
        require_file_place(tmp_path / ("x" * 250))


@pytest.mark.parametrize(
    ("one", "other", "texts"),
    [
        (10_200_000, 10_100_000, ("10.2 MB", "10.1 MB")),
        (10_000_001, 10_000_000, ("10.000001 MB", "10.000000 MB")),
        (3 * 10**12, 512, ("3.0 TB", "512 bytes")),
        (10**15 + 1, 10**15, ("1000.000000000001 TB", "1000.000000000000 TB")),
        (7, 0, ("7 bytes", "0 bytes")),
    ],
)
def test_two_sizes_never_read_as_equal(one: int, other: int, texts: tuple[str, str]) -> None:
    assert distinct_sizes(one, other) == texts


def test_too_little_space_is_told_in_figures_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(20, 0, 9_990_000))  # type: ignore[attr-defined]
    with pytest.raises(DiskError, match=r"needs about 9\.991 MB in .*/a/b, but only 9\.990 MB is free"):
        require_free_space(tmp_path / "a" / "b", 9_991_000, "This")
    require_free_space(tmp_path / "a" / "b", 9_990_000, "This")


def test_an_error_of_writing_names_the_file_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone/a\.json'$"):
        write_atomic(tmp_path / "gone/a.json", "{}")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"folder'$"):
        write_atomic(tmp_path / "folder", "{}")


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 35, 400])
def test_a_hash_is_that_of_the_whole_file_whatever_the_blocks(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_CHUNK_BYTES", 10)
    content = bytes(number % 251 for number in range(size))
    (tmp_path / "file").write_bytes(content)
    assert files.sha256_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()
    assert files.blake3_file(tmp_path / "file") == blake3(content).hexdigest()
