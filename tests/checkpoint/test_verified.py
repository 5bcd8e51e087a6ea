"""Verification shared out over ranks: every file is read once, by the rank that needs it where there is one."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import extended  # noqa: F401  (stages that only tests have)
import pytest
import torch
from damage import flip_a_bit
from tiny import make_stage, run_config

from rxt_dist.checkpoint import state
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import ROUTING_FILE, rank_file
from rxt_dist.checkpoint.state import save_state, state_checksum
from rxt_dist.checkpoint.store import CHECKSUM, Checkpoint, CheckpointStore, FileRecord
from rxt_dist.checkpoint.verified import described_together, load_verified, share_of, verify_together
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError

CPU = torch.device("cpu")
ALONE = Collectives(CPU)


def names(files: list[FileRecord]) -> list[str]:
    return [file.name for file in files]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_file_is_one_ranks_and_own_ones_come_first(world_size: int) -> None:
    written = [rank_file(rank, part) for rank in range(4) for part in range(2)] + [ROUTING_FILE]
    files = [FileRecord(name, 1, "") for name in written]
    shares = [share_of(files, rank, world_size) for rank in range(world_size)]
    assert sorted(name for share in shares for name in names(share)) == sorted(written)
    for rank in range(min(4, world_size)):
        assert {rank_file(rank), rank_file(rank, 1)} <= set(names(shares[rank]))
    if world_size == 2:
        assert abs(len(shares[0]) - len(shares[1])) <= 1


def save(store: CheckpointStore, step: int) -> Path:
    folder = store.begin(step)
    for name in (rank_file(0), ROUTING_FILE):
        (folder / name).write_bytes(bytes(100))
    return store.commit(step, [store.record(path) for path in folder.iterdir()], {"tokens": step})


@pytest.mark.parametrize("name", [rank_file(0), ROUTING_FILE, "manifest.json"])
def test_one_bit_is_found_in_every_file(name: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    path = save(store, 1) / name
    checkpoint, problems = verify_together(ALONE, store, 1)
    assert checkpoint is not None
    assert (checkpoint.step, problems) == (1, [])
    flip_a_bit(path)
    checkpoint, problems = verify_together(ALONE, store, 1)
    assert checkpoint is None
    assert problems[0].startswith(f"{name}: ")


def test_what_was_found_damaged_does_not_count_when_pruning(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2)
    for step in (1, 2):
        save(store, step)
    (store.folder(2) / ROUTING_FILE).write_bytes(bytes(99) + b"x")
    life = CheckpointStore(tmp_path, 2)
    assert verify_together(ALONE, life, 2)[0] is None
    save(life, 3)
    assert list(life.steps()) == [1, 2, 3]


class Second(Collectives):
    """The second of two ranks; the first has found nothing."""

    def __init__(self) -> None:
        self.rank, self.world_size, self.distributed = 1, 2, False

    def together(self, action: Any) -> list[Any]:
        own = action()
        return [("0" * 64, "") if isinstance(own, tuple) else [], own]


def test_a_rank_that_sees_another_folder_says_so(tmp_path: Path) -> None:
    checkpoint, problems = verify_together(Second(), CheckpointStore(tmp_path, 2), 1)
    assert checkpoint is None
    assert "cannot be read" in problems[0]


def engine_of(stage: str = "joint") -> tuple[PlainEngine, FrozenWeights]:
    made = make_stage(run_config(stage=stage))
    engine = PlainEngine(made, made.run, CPU)
    return engine, FrozenWeights(made.model, engine.ranks)


@pytest.fixture
def saved(tmp_path: Path) -> CheckpointStore:
    """Two checkpoints of a tiny model: that of step 2 has other weights."""
    store, (engine, frozen) = CheckpointStore(tmp_path, 3), engine_of()
    for step in (1, 2):
        save_state(engine, frozen, store, step, {})
        next(engine.fragments(owned=True)).tensors["weight"].add_(1.0)
    return store


def test_what_was_loaded_is_known_when_pruning(saved: CheckpointStore) -> None:
    """Damage of after the load is noticed, though sizes are as they were."""
    (engine, frozen), life = engine_of(), CheckpointStore(saved.directory, 3)
    assert load_verified(engine, frozen, life, saved.read(2), 1) == []
    assert list(life.reasons()) == [1, 2]
    flip_a_bit(saved.folder(2) / rank_file(0), -3)
    assert list(life.reasons()) == [1]


# In the length of the description, in a name, in the last moment, and in the routing state.
@pytest.mark.parametrize(
    ("name", "at"), [(rank_file(0), 1), (rank_file(0), 12), (rank_file(0), -3), (ROUTING_FILE, 2), (ROUTING_FILE, -1)]
)
def test_damage_is_found_while_a_state_is_read_and_an_earlier_one_takes_its_place(
    name: str, at: int, saved: CheckpointStore
) -> None:
    (engine, frozen), life = engine_of(), CheckpointStore(saved.directory, 3)
    flip_a_bit(saved.folder(2) / name, at)
    (problem,) = load_verified(engine, frozen, life, saved.read(2), 1)
    assert problem.startswith(f"{name}: damaged")
    assert list(life.reasons()) == [1], "what was found damaged does not count when pruning"
    assert load_verified(engine, frozen, life, saved.read(1), 1) == []
    assert (
        state_checksum(engine, frozen) == saved.read(1).meta["state_checksum"] != saved.read(2).meta["state_checksum"]
    )


@pytest.mark.parametrize("times", [1, 2])
def test_what_was_wrong_on_its_way_is_read_once_more(
    times: int, saved: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoilt_at: list[int] = []

    def spoilt(number: int, views: Any, at: int, real: Any = os.preadv) -> int:
        count = real(number, views, at)
        if at > 1000 and len(spoilt_at) < times and at == [*spoilt_at, at][0]:
            spoilt_at.append(at)
            views[0][:1] = bytes([views[0][0] ^ 1])
        return int(count)

    monkeypatch.setattr(os, "preadv", spoilt)
    monkeypatch.setattr(state, "_THREADS", 1)
    engine, frozen = engine_of()
    if times == 1:
        assert load_verified(engine, frozen, saved, saved.read(1), 1) == []
        assert state_checksum(engine, frozen) == saved.read(1).meta[CHECKSUM]
    else:
        with pytest.raises(CheckpointError, match="has checksum"):
            load_verified(engine, frozen, saved, saved.read(1), 1)


def of_an_older_version(saved: CheckpointStore, step: int) -> Checkpoint:
    """With its files hashed, and another checksum of the state."""
    path = saved.folder(step) / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    body["format"] = 2
    body["meta"]["checksum"] = body["meta"].pop(CHECKSUM) // 2
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "digest": digest}))
    return saved.read(step)


def test_a_checkpoint_of_an_older_version_is_hashed(saved: CheckpointStore) -> None:
    engine, frozen = engine_of()
    checksum = saved.read(1).meta[CHECKSUM]
    assert load_verified(engine, frozen, saved, of_an_older_version(saved, 1), 1) == []
    assert state_checksum(engine, frozen) == checksum
    flip_a_bit(saved.folder(1) / rank_file(0), -3)
    (problem,) = load_verified(engine, frozen, saved, saved.read(1), 1)
    assert problem.startswith(f"{rank_file(0)}: damaged")


class Elsewhere(Collectives):
    """The first of two ranks; the other one sees another manifest."""

    def together(self, action: Any) -> list[Any]:
        own = action()
        return [own, ("f" * 64, "")] if isinstance(own, tuple) else [own]


def test_ranks_that_see_different_manifests_say_so(saved: CheckpointStore) -> None:
    checkpoint, problems = described_together(Elsewhere(CPU), saved, 1)
    assert checkpoint is None
    assert "ranks see different ones" in problems[0]


def test_a_sound_state_of_another_model_is_no_damage(saved: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"holds 'encoder\..*' and [1-9]\d* more parameters"):
        load_verified(*engine_of("lm"), saved, saved.read(1), 1)


def test_a_state_in_the_wrong_place_is_found_though_its_files_are_whole(saved: CheckpointStore) -> None:
    checkpoint = saved.read(1)
    checkpoint.meta[CHECKSUM] += 1
    with pytest.raises(CheckpointError, match="went to the wrong place"):
        load_verified(*engine_of(), saved, checkpoint, 1)
