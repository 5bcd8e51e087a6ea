"""The account of a run's jobs, and what follows from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from launch.slurm import ledger as account
from launch.slurm.ledger import Ledger, barren_lives, excluded_nodes, is_over, lines_of, unended
from rxt_dist.errors import DiskError


def end(**fields: Any) -> dict[str, Any]:
    return {"kind": "end", "code": 1, "reason": "x", "progressed": False, "blamed": [], "excused": False} | fields


def test_lines_are_kept_and_torn_ones_left_out(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.add("submitted", submission=1)
    with open(ledger.path, "a") as file:
        file.write('{"kind": "en')
    ledger.add("job", job="7")
    assert [line["kind"] for line in ledger.read()] == ["submitted", "job"]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")

    def full(path: Path, value: Any) -> None:
        raise DiskError("full")

    with monkeypatch.context() as patched:
        patched.setattr(account, "append_line", full)
        ledger.add("life", life="a")
        ledger.add("end", life="a")
    assert [line["kind"] for line in ledger.read()] == ["life", "end"]
    assert not ledger.path.exists()
    ledger.add("life", life="b")
    assert [line["kind"] for line in Ledger(ledger.path).read()] == ["life", "end", "life"]


def test_what_happened_before_the_last_submission_is_over() -> None:
    first, second = {"kind": "submitted", "submission": 1}, {"kind": "submitted", "submission": 2}
    lines = [first, end(job="1"), second, end(job="2"), first | {"again": True}, end(job="3")]
    assert lines_of(lines, 1) == lines[4:]
    assert lines_of(lines, 2) == lines[2:]
    assert lines_of(lines, 3) == []


def test_a_submission_whose_first_line_is_torn_begins_with_its_first_whole_one() -> None:
    """Else nothing would be known of it: a crash loop would go on for ever, on the node that is bad."""
    first, second = {"kind": "submitted", "submission": 1}, {"kind": "job", "job": "8", "submission": 2}
    lines = [first, end(job="7", submission=1), second, {"kind": "bad_node", "host": "c"}]
    assert lines_of(lines, 2) == lines[2:]
    assert lines_of(lines, 3) == []


def test_a_node_is_avoided_after_a_failed_check_or_two_failures() -> None:
    assert excluded_nodes([end(blamed=["b"]), end(blamed=["a"])]) == []
    assert excluded_nodes([end(blamed=["b"]), end(blamed=["a", "b"])]) == ["b"]
    assert excluded_nodes([{"kind": "bad_node", "host": "c"}, end(blamed=["b"]), end(blamed=["b"])]) == ["b", "c"]


def test_barren_lives_are_the_last_in_a_row_without_progress_or_excuse() -> None:
    lines = [end(reason="old"), end(progressed=True), end(reason="one"), end(excused=True), end(reason="two")]
    assert barren_lives(lines) == ["1: one", "1: two"]
    assert barren_lives([*lines, end(progressed=True)]) == []


def test_a_life_without_an_end_is_found() -> None:
    life = {"kind": "life", "life": "a"}
    assert unended([end(), life, {"kind": "signal"}]) == life
    assert unended([life, end()]) is None
    assert unended([]) is None


def test_a_chain_is_over_when_another_job_of_it_says_so() -> None:
    for action in ("failed", "stopped", "cancelled"):
        lines = [end(job="1", action=action)]
        assert is_over(lines, "2") == lines[0]
        assert is_over(lines, "1") is None, "the same job, which somebody has requeued"
    assert is_over([end(job="1", action="requeue")], "2") is None
    assert is_over([end(job="1", action="failed"), end(job="1", action="restart")], "2") is None
