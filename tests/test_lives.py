"""What a launcher tells its ranks arrives; a process that nobody launched finds out for itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

from rxt_dist.lives import Life, file_identity, launched_by_us, old_file


def test_what_a_launcher_says_arrives(tmp_path: Path) -> None:
    full = Life("abc", 1234.5678, 2, 99.25, "7:8", tmp_path / "words", tmp_path / "stop")
    assert Life.of_process(full.environment()) == full
    assert launched_by_us(full.environment())
    bare = Life("abc", 1.0, old_stop="")
    assert Life.of_process(bare.environment()) == bare


def test_without_a_launcher_the_process_is_the_life() -> None:
    first, second = Life.of_process({}), Life.of_process({"SLURM_RESTART_COUNT": "3"})
    assert first.token != second.token
    assert (first.attempt, second.attempt) == (0, 3)
    assert first.old_stop is first.deadline is first.last_words is None
    # This process began before now, and not long before its own clock's hours.
    assert 0 < time.time() - first.launched < 24 * 3600
    assert abs(first.launched - second.launched) < 1
    assert not launched_by_us({})


def test_a_file_that_is_touched_or_made_again_is_another(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    assert file_identity(path) == ""
    path.touch()
    first = file_identity(path)
    assert file_identity(path) == first
    os.utime(path, ns=(5, 5))
    assert file_identity(path) not in ("", first)


def test_a_file_is_old_if_it_was_there_before_the_launch(tmp_path: Path) -> None:
    path = tmp_path / "STOP"
    assert old_file(path, time.time()) == ""
    path.touch()
    assert old_file(path, time.time() + 10) == file_identity(path)
    assert old_file(path, time.time() - 10) == "", "made while the launcher read its configuration"
