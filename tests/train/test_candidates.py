"""Which checkpoints are offered, in which order, and what is said of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from damage import flip_a_bit

from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError
from rxt_dist.train.candidates import Candidates, newest_sound

ALONE = Collectives(torch.device("cpu"))


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """Checkpoints of steps 1 to 4, of which the third was made while losses were suspect."""
    store = CheckpointStore(tmp_path / "checkpoints", 9)
    for step in range(1, 5):
        (store.begin(step) / "file").write_bytes(bytes(9))
        store.commit(step, [store.record(store.unfinished_folder(step) / "file")], {"suspect": step == 3})
    return store


def offered(candidates: Candidates) -> list[int]:
    """The steps of all, each found damaged when it is read."""
    found, one = [], candidates.first()
    while one is not None:
        found.append(one.step)
        try:
            one = candidates.after(one, ["file: damaged"])
        except CheckpointError:
            return found
    return found


def test_all_are_offered_newest_first_and_each_remark_is_said_once(store: CheckpointStore) -> None:
    candidates = Candidates(ALONE, store, None)
    assert offered(candidates) == [4, 3, 2, 1]
    said: list[str] = []
    candidates.tell(said.append)
    candidates.tell(said.append)
    assert [text.count("is rejected: file: damaged.") for text in said] == [1, 0, 1, 1, 1]
    assert "step-00000003 was made while losses were suspect" in said[1]


def test_what_was_given_up_is_not_offered_but_the_last_before_it_is(store: CheckpointStore) -> None:
    candidates = Candidates(ALONE, store, 2)
    assert offered(candidates) == [2, 1]
    assert [text for text in candidates.remarks if "history that was given up" in text] == [
        f"Checkpoint {store.folder(step)} is of a history that was given up." for step in (3, 4)
    ]


def test_a_run_begins_anew_only_if_it_has_none(store: CheckpointStore, tmp_path: Path) -> None:
    assert Candidates(ALONE, CheckpointStore(tmp_path / "nothing", 2), None).first() is None
    with pytest.raises(CheckpointError, match="will not start again from nothing"):
        Candidates(ALONE, store, 0).first()


def test_one_that_is_not_whole_by_its_sizes_is_passed_over(store: CheckpointStore) -> None:
    (store.folder(4) / "file").write_bytes(bytes(8))
    candidates = Candidates(ALONE, store, None)
    first = candidates.first()
    assert first is not None
    assert first.step == 3
    assert "file: 8 bytes instead of 9" in candidates.remarks[0]


def test_a_named_one_has_no_other_in_its_place(store: CheckpointStore) -> None:
    candidates = Candidates(ALONE, store, None, named=2)
    assert candidates.is_named
    first = candidates.first()
    assert first is not None
    assert first.step == 2
    with pytest.raises(CheckpointError, match=r"step-00000002 is rejected: file: damaged. Name another step"):
        candidates.after(first, ["file: damaged"])


@pytest.mark.parametrize(
    ("named", "up_to", "text"), [(7, None, "its steps are: 1, 2, 3, 4"), (3, 2, "an earlier one, of step 2 at most")]
)
def test_a_named_one_must_be_there_and_of_this_history(
    store: CheckpointStore, named: int, up_to: int | None, text: str
) -> None:
    with pytest.raises(CheckpointError, match=text):
        Candidates(ALONE, store, up_to, named)
    assert Candidates(ALONE, store, 2, named=2).first() is not None


def test_a_rollback_takes_one_that_was_hashed_and_is_not_suspect(store: CheckpointStore) -> None:
    flip_a_bit(store.folder(4) / "file")
    found, passed_over = newest_sound(ALONE, store, up_to=None)
    assert found is not None
    assert found.step == 2
    assert ["damaged" in text for text in passed_over] == [True, False]
    assert newest_sound(ALONE, store, up_to=0)[0] is None
