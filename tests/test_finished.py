"""Whether a run is finished, as everything that asks sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rxt_dist.finished import finished_step, is_finished, newest_step


def run_with(tmp_path: Path, *checkpoints: str, said: bytes | None = None) -> Path:
    for name in checkpoints:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    if said is not None:
        (tmp_path / "finished.json").write_bytes(said)
    return tmp_path


def test_it_is_up_to_its_newest_checkpoint(tmp_path: Path) -> None:
    run = run_with(tmp_path, "step-00000004", "step-00000012", "step-00000020.tmp", said=b'{"step": 12}')
    assert newest_step(run) == 12
    assert finished_step(run) == 12
    assert is_finished(run)


def test_it_is_not_where_training_went_on(tmp_path: Path) -> None:
    run = run_with(tmp_path, "step-00000012", "step-100000000", said=b'{"step": 12}')
    assert newest_step(run) == 100_000_000
    assert not is_finished(run)


NO_STEPS = (
    b"",
    b"{",
    b"[]",
    b"\xff",
    b'{"step": null}',
    b'{"step": "12"}',
    b'{"step": true}',
    b'{"step": -1}',
    b"[" * 99999,
)


@pytest.mark.parametrize("said", [None, *NO_STEPS])
def test_what_cannot_be_read_says_nothing(tmp_path: Path, said: bytes | None) -> None:
    run = run_with(tmp_path, "step-00000012", said=said)
    assert finished_step(run) is None
    assert not is_finished(run)


def test_without_a_checkpoint_nothing_is_finished(tmp_path: Path) -> None:
    """A report of a copy without checkpoints still tells what it says."""
    run = run_with(tmp_path, said=json.dumps({"step": 12}).encode())
    assert newest_step(run) == -1
    assert not is_finished(run)
    assert finished_step(run) == 12
    assert not is_finished(tmp_path / "nowhere")
