"""Which checkpoints stay: rules on what manifests say, and the store that follows them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from rxt_dist.checkpoint.retention import Retention
from rxt_dist.checkpoint.store import LATEST, CheckpointStore


def meta(tokens: int, loss: float | None = None, **other: Any) -> dict[str, Any]:
    return {"tokens": tokens, "evaluation": None if loss is None else {"step": 1, "loss": loss}, **other}


def test_the_newest_stay() -> None:
    sound = {step: meta(100 * step) for step in range(1, 6)}
    assert Retention(2).choose(sound) == {4: "newest", 5: "newest"}


def test_a_suspect_one_is_counted_as_nothing() -> None:
    sound = {step: meta(100 * step, 1.0 / step, suspect=step in (1, 4, 5)) for step in range(1, 6)}
    assert Retention(2, milestone_tokens=100, keep_best=True).choose(sound) == {2: "newest", 3: "newest"}


def test_the_first_of_every_so_many_tokens_is_a_milestone() -> None:
    sound = {step: meta(tokens) for step, tokens in enumerate((90, 110, 130, 210, 390, 391, 399, 400), 1)}
    chosen = Retention(2, milestone_tokens=100).choose(sound)
    assert chosen == {2: "milestone", 4: "milestone", 5: "milestone", 7: "newest", 8: "newest"}
    left = {step: sound[step] for step in chosen}
    assert Retention(2, milestone_tokens=100).choose(left) == chosen, "the same once the others are gone"


def test_the_lowest_loss_stays_and_of_equal_ones_the_first() -> None:
    losses = {1: None, 2: 0.0, 3: 0.5, 4: 0.0, 5: 0.5, 6: 0.5}
    sound = {step: meta(step, loss) for step, loss in losses.items()}
    assert Retention(2, keep_best=True).choose(sound) == {2: "best", 5: "newest", 6: "newest"}
    assert Retention(2).choose(sound) == {5: "newest", 6: "newest"}


def test_fewer_than_two_is_refused() -> None:
    with pytest.raises(ValueError, match="keep is 1"):
        Retention(1)


def save(store: CheckpointStore, step: int, **said: Any) -> Path:
    path = store.begin(step) / "weights"
    path.write_bytes(b"x" * step)
    return store.commit(step, [store.record(path)], meta(100 * step, **said))


def test_a_store_keeps_what_the_rules_name(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, milestone_tokens=300, keep_best=True)
    for step, loss in enumerate((3.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0), 1):
        save(store, step, loss=loss)
    assert list(store.steps()) == [2, 3, 6, 7]
    assert store.reasons() == {2: "best", 3: "milestone", 6: "newest", 7: "newest"}


def test_suspect_ones_push_no_good_one_out_and_go_in_their_turn(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step in range(1, 7):
        save(store, step, suspect=step > 2)
    assert list(store.steps()) == [1, 2, 3, 4, 5, 6]
    save(store, 7)
    assert list(store.steps()) == [2, 3, 4, 5, 6, 7]
    save(store, 8)
    assert list(store.steps()) == [7, 8]


def test_looking_removes_nothing(tmp_path: Path) -> None:
    for step in range(1, 5):
        save(CheckpointStore(tmp_path, 9), step)
    store = CheckpointStore(tmp_path, 2)
    assert [path.name for path in store.prune(remove=False)] == ["step-00000001", "step-00000002"]
    assert list(store.steps()) == [1, 2, 3, 4]


def test_what_is_later_is_set_aside_and_none_of_it_is_lost(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 9)
    for step in range(1, 5):
        save(store, step)
    store.unfinished_folder(5).mkdir()
    lines = tmp_path / "metrics.jsonl"
    lines.write_text("{}\n")
    aside = store.set_aside(2, beside=[lines])
    assert list(store.steps()) == [1, 2]
    names = ["metrics.jsonl", "step-00000003", "step-00000004", "step-00000005.tmp"]
    assert sorted(path.name for path in aside.iterdir()) == names
    assert store.verify(aside / "step-00000004") == []
    newest = store.latest_valid(pytest.fail)
    assert newest is not None
    assert newest.step == 2
    save(store, 3)
    assert store.set_aside(2) != aside
    assert (tmp_path / LATEST).read_text() == "step-00000002\n"
    store.set_aside(0)
    assert not (tmp_path / LATEST).exists()


def test_a_kill_while_checkpoints_are_set_aside_loses_no_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds nothing to move any more copies nothing, and drops the lines that come again."""

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    store = CheckpointStore(tmp_path, 9)
    for step in range(1, 4):
        save(store, step)
    lines = tmp_path / "metrics.jsonl"
    lines.write_text("{}\n")
    monkeypatch.setattr(os, "rename", kill)
    with pytest.raises(Killed):
        store.set_aside(2, beside=[lines])
    assert [(path / "metrics.jsonl").read_text() for path in store.aside()] == ["{}\n"]
