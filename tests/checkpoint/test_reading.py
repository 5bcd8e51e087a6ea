"""Tensors of files are read to their places, however few bytes the system gives at once and whoever else reads."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from rxt_dist.checkpoint import reading
from rxt_dist.checkpoint.daemons import map_on_daemons
from rxt_dist.checkpoint.reading import OpenFiles, Place
from rxt_dist.errors import CheckpointError

A, B = torch.arange(1000.0), -torch.arange(1.0, 8.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_file({"a": A, "b": B, "none": torch.empty(0)}, tmp_path / "file", {"format": "pt"})
    return tmp_path / "file"


def read(path: Path, name: str, first: int, target: torch.Tensor) -> torch.Tensor:
    files = OpenFiles()
    files.read(path, files.places(path)[name].at + 4 * first, target)
    return target


def test_every_tensor_has_its_place(path: Path) -> None:
    places = OpenFiles().places(path)
    assert {name: place.length for name, place in places.items()} == {"a": 1000, "b": 7, "none": 0}
    assert torch.equal(read(path, "a", 0, torch.empty(1000)), A)
    assert torch.equal(read(path, "b", 2, torch.empty(4)), B[2:6])
    assert read(path, "none", 0, torch.empty(0)).numel() == 0


def test_a_system_that_reads_a_little_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does beyond 2 GB, on a signal, and over some networks: also in the middle of a number."""
    real = os.preadv

    def little(number: int, views: Sequence[Any], at: int) -> int:
        return real(number, [views[0][:101]], at)

    monkeypatch.setattr(reading.os, "preadv", little)
    assert torch.equal(read(path, "a", 3, torch.empty(900)), A[3:903])


@pytest.mark.parametrize("times", [2, 3])
@pytest.mark.parametrize("name", ["preadv", "open"])
def test_a_disk_that_fails_for_seconds_is_asked_again(
    name: str, times: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    failures = iter([OSError(errno.EIO, os.strerror(errno.EIO))] * times)

    real = getattr(os, name)

    def fail(*arguments: Any) -> int:
        for error in failures:
            raise error
        return int(real(*arguments))

    monkeypatch.setattr(reading.os, name, fail)
    monkeypatch.setattr("rxt_dist.files.time.sleep", waited.append)
    if times == 2:
        assert torch.equal(read(path, "a", 0, torch.empty(1000)), A)
    else:
        with pytest.raises(OSError, match="Input/output"):
            read(path, "a", 0, torch.empty(1000))
    assert waited == [1.0, 5.0]


@pytest.mark.parametrize("make", [lambda: torch.empty(20, dtype=torch.bfloat16), lambda: torch.empty(40)[::2]])
def test_a_target_of_another_type_or_with_gaps_is_filled_in_blocks(
    make: Any, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    monkeypatch.setattr(reading, "_BLOCK_ELEMENTS", 7)
    target = make()
    assert torch.equal(read(path, "a", 5, target), A[5:25].to(target.dtype))


def test_a_parameter_that_is_trained_is_filled(path: Path) -> None:
    target = torch.nn.Parameter(torch.empty(10))
    read(path, "a", 0, target)
    assert torch.equal(target.data, A[:10])


def test_each_thread_keeps_so_many_files_open_and_opens_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_MOST_OPEN", 3)
    paths = [tmp_path / str(number) for number in range(20)]
    for number, path in enumerate(paths):
        save_file({"a": A + number}, path)
    files = OpenFiles()
    at = files.places(paths[0])["a"].at
    before, opened = open_below(tmp_path), []
    real = os.open
    monkeypatch.setattr(os, "open", lambda path, flags: (opened.append(path), real(path, flags))[1])

    def read_all(numbers: list[int]) -> int:
        for number in numbers:
            target = torch.empty(1000)
            files.read(paths[number], at, target)
            assert torch.equal(target, A + number)
        return open_below(tmp_path)

    # Every other one reads from as many files as it may have open, the others from more.
    work = [[0, 1, 2] * 10 if thread % 2 else list(range(20)) for thread in range(8)]
    # One is opened before another is closed.
    assert max(map_on_daemons(read_all, work, 8)) <= before + 8 * (3 + 1)
    assert len(opened) <= 4 * 3 + 4 * 20
    assert open_below(tmp_path) == before, "those of threads that have ended are closed"
    # This thread has opened the first one already.
    assert read_all(list(range(20))) == before - 1 + 3


def open_below(folder: Path) -> int:
    """Open files below a folder; what other threads have open meanwhile to count theirs is none."""
    found = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{number}").startswith(f"{folder}/")
    return found


def test_a_file_that_ends_too_early_is_said(path: Path) -> None:
    place = OpenFiles().places(path)["a"]
    os.truncate(path, place.at + 4 * 1000 - 1)
    with pytest.raises(CheckpointError, match="file ends 1 bytes before its last tensor"):
        read(path, "a", 0, torch.empty(1000))


def described(entry: Any) -> bytes:
    text = json.dumps({"a": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 100,
        (4).to_bytes(8, "little") + b"null",
        described({"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}),
        described({"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}),
        described({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}),
        described({"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}),
        described({"shape": [2]}),
    ],
)
def test_what_is_no_file_of_such_tensors_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError, match="file is not a file of float32 tensors"):
        OpenFiles().places(tmp_path / "file")


def test_a_place_is_a_byte_and_a_number_of_elements(tmp_path: Path) -> None:
    content = described({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})
    (tmp_path / "file").write_bytes(content)
    assert OpenFiles().places(tmp_path / "file") == {"a": Place(len(content) - 8, 2)}
