"""Phases that read datasets of their own: what is joined, what is refused, and what of the order never changes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_documents, write_dataset

from rxt_dist.config.load import load_run
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.row_source import RowSource
from rxt_dist.data.sampler import BLOCK, DataState
from rxt_dist.errors import ConfigError, DataError

DEMO = Path(__file__).parents[2] / "configs/run/demo.yaml"
SEQ_LEN = 32
BLOCK_TOKENS = BLOCK * SEQ_LEN


@pytest.fixture
def other_dir(tmp_path: Path) -> Path:
    """Another dataset, with two sources of which one is called as one of the first."""
    root = tmp_path / "other"
    documents = {
        name: {"train": make_documents(seed, 150), "eval": make_documents(seed + 100, 4)}
        for seed, name in ((50, "de"), (60, "en"))
    }
    root.mkdir()
    write_dataset(root, documents)
    return root


def source_of(dataset_dir: Path, *phases: dict[str, Any], blocks: int = 3) -> RowSource:
    mixture = f"data.mixture={json.dumps(phases, default=str)}"
    changes = [f"data.path={dataset_dir}", "data.seq_len=null", "data.max_epochs=1e6", mixture]
    return RowSource(load_run(DEMO, [*changes, f"train.total_tokens={blocks * BLOCK_TOKENS}"]))


def first_phase(blocks: int = 1) -> dict[str, Any]:
    return {"tokens": blocks * BLOCK_TOKENS, "by_size": True}


def state_at(source: RowSource, position: int) -> DataState:
    """As a checkpoint keeps it."""
    return DataState.from_dict(
        json.loads(json.dumps(DataState.at(source.order, source.digests, position, 0).to_dict()))
    )


def test_the_order_before_a_change_stays_bit_for_bit(dataset_dir: Path, other_dir: Path) -> None:
    alone = source_of(dataset_dir)
    joined = source_of(dataset_dir, first_phase(), {"path": other_dir, "weights": {"en": 3, "de": 1}})
    before, whole = np.arange(BLOCK), slice(0, BLOCK)
    read, same = alone.read(before, whole), joined.read(before, whole)
    assert torch.equal(read.tokens_BT, same.tokens_BT)
    assert torch.equal(read.source_B, same.source_B)
    for position in (1, 77, BLOCK):
        assert alone.order.plan_hash(position) == joined.order.plan_hash(position)
        assert state_at(alone, position) == state_at(joined, position)
        state_at(alone, position).check(joined.order, joined.digests)
    assert alone.order.plan_hash(BLOCK + 1) != joined.order.plan_hash(BLOCK + 1)


def test_a_batch_may_reach_over_the_border(dataset_dir: Path, other_dir: Path) -> None:
    joined = source_of(dataset_dir, first_phase(), {"path": other_dir, "weights": {"en": 3, "de": 1}})
    assert [one.name for one in joined.sources] == ["en", "pl", "und", "de@2", "en@2"]
    positions = np.arange(BLOCK - 40, BLOCK + 400)
    batch = joined.read(positions, slice(0, len(positions)))
    assert batch.samples_B.tolist() == positions.tolist()
    assert set(batch.source_B[:40].tolist()) <= {0, 1, 2}
    assert set(batch.source_B[40:].tolist()) == {3, 4}
    source_R, row_R = joined.order.rows(positions)
    first, other = TokenDataset(dataset_dir), TokenDataset(other_dir)
    for at in (0, 39, 40, 41, 300, 439):
        dataset, index = (first, int(source_R[at])) if at < 40 else (other, int(source_R[at]) - 3)
        stored = dataset.read("train", np.array([index]), row_R[at : at + 1]).tokens_RT[0]
        assert np.array_equal(batch.tokens_BT[at].numpy().view(np.uint16), stored)
    drawn = {plan.name: plan.rows for plan in joined.order.plan()}
    assert (drawn["en@2"], drawn["de@2"]) == (2 * BLOCK * 3 // 4, 2 * BLOCK // 4)


def test_held_out_rows_are_those_of_every_dataset_that_is_named(dataset_dir: Path, other_dir: Path) -> None:
    joined = source_of(dataset_dir, first_phase(), {"path": other_dir, "by_size": True})
    other = TokenDataset(other_dir)
    for index in (0, 1):
        count = other.rows(index, "eval")
        assert joined.held_out(3 + index) == count > 1
        read = joined.read_held_out(3 + index, np.arange(count), slice(0, count))
        stored = other.read("eval", np.full(count, index), np.arange(count)).tokens_RT
        assert np.array_equal(read.tokens_BT.numpy().view(np.uint16), stored)


def test_a_dataset_is_its_content(dataset_dir: Path, other_dir: Path, tmp_path: Path) -> None:
    """A copy in another folder goes on where the first was left, and a third phase may come back to the first."""
    copy = tmp_path / "copy"
    shutil.copytree(dataset_dir, copy)
    twice = source_of(dataset_dir, first_phase(), {"path": copy, "by_size": True})
    assert (len(twice.digests), len(twice.sources)) == (1, 3)
    positions, whole = np.arange(2 * BLOCK - 50, 2 * BLOCK), slice(0, 50)
    one = source_of(dataset_dir, first_phase(), {"by_size": True})
    assert torch.equal(twice.read(positions, whole).tokens_BT, one.read(positions, whole).tokens_BT)
    phases = (first_phase(), {**first_phase(), "path": other_dir}, {"path": copy, "by_size": True})
    back = source_of(dataset_dir, *phases)
    assert len(back.digests) == 2
    assert set(back.order.rows(np.arange(2 * BLOCK, 3 * BLOCK))[0].tolist()) <= {0, 1, 2}
    # 8,192 rows of the first are drawn in all, of which one block before the other dataset came.
    assert sum(plan.rows for plan in back.order.plan() if "@" not in plan.name) == 2 * BLOCK


@pytest.mark.parametrize("position", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK])
def test_a_change_before_the_position_is_refused_and_the_first_place_for_one_named(
    position: int, dataset_dir: Path, other_dir: Path
) -> None:
    saved = state_at(source_of(dataset_dir), position)
    allowed = -(-position // BLOCK)
    for blocks in range(1, 4):
        changed = source_of(dataset_dir, first_phase(blocks), {"path": other_dir, "by_size": True}, blocks=4)
        if blocks >= allowed:
            saved.check(changed.order, changed.digests)
            continue
        with pytest.raises(DataError, match=rf"at {allowed * BLOCK_TOKENS:,} tokens or later: keep data.path") as told:
            saved.check(changed.order, changed.digests)
        assert f"{{tokens: {allowed * BLOCK_TOKENS}, by_size: true}}" in str(told.value)


def test_another_dataset_in_the_place_of_the_first_is_refused(dataset_dir: Path, other_dir: Path) -> None:
    saved = state_at(source_of(dataset_dir), 5)
    changed = source_of(other_dir)
    with pytest.raises(DataError, match=r"the shards are not the ones training began with.* as `path`"):
        saved.check(changed.order, changed.digests)


def test_a_later_dataset_may_change_until_it_is_read(dataset_dir: Path, other_dir: Path, tmp_path: Path) -> None:
    third = tmp_path / "third"
    third.mkdir()
    write_dataset(third, {"fr": {"train": make_documents(70, 90), "eval": make_documents(71, 4)}})
    one = source_of(dataset_dir, first_phase(), {"path": other_dir, "by_size": True})
    two = source_of(dataset_dir, first_phase(), {"path": third, "by_size": True})
    state_at(one, BLOCK).check(two.order, two.digests)
    with pytest.raises(DataError, match=r"dataset_digests was \w+, \w+ and is now"):
        state_at(one, BLOCK + 1).check(two.order, two.digests)
    more = source_of(dataset_dir, first_phase(), {**first_phase(), "path": other_dir}, {"path": third, "by_size": True})
    state_at(one, 2 * BLOCK).check(more.order, more.digests)
    assert len(state_at(more, 2 * BLOCK).dataset_digests) == 2
    assert len(state_at(more, 2 * BLOCK + 1).dataset_digests) == 3


def test_states_of_before_there_were_several_datasets_are_read(dataset_dir: Path, other_dir: Path) -> None:
    alone = source_of(dataset_dir)
    saved = DataState.at(alone.order, alone.digests, 9, 0).to_dict()
    (saved["dataset_digest"],) = saved.pop("dataset_digests")
    joined = source_of(dataset_dir, first_phase(), {"path": other_dir, "by_size": True})
    DataState.from_dict(saved).check(joined.order, joined.digests)


def test_a_phase_by_size_is_what_is_read_without_a_mixture(dataset_dir: Path) -> None:
    assert source_of(dataset_dir, {"by_size": True}).order.plan_hash(9) == source_of(dataset_dir).order.plan_hash(9)


def test_data_that_cannot_be_joined_is_refused(dataset_dir: Path, other_dir: Path) -> None:
    manifest, path = load_manifest(other_dir), other_dir / "dataset.json"
    for changed, said in (
        (
            replace(manifest, tokenizer_sha256="ef" * 32).to_dict(),
            r"every id would mean something else\. Build it again",
        ),
        (
            replace(manifest, seq_len=16).to_dict(),
            r"rows of 16 tokens, but .* rows of 32: .*data repack .* --seq-len 32",
        ),
        (
            manifest.to_dict() | {"boundaries": "interactions"},
            "holds interactions, of which only the answers carry loss",
        ),
        (manifest.to_dict() | {"format": "rxt-dialogues"}, "holds dialogues, made for the memory stages"),
    ):
        path.write_text(json.dumps(changed))
        with pytest.raises(DataError, match=said):
            source_of(dataset_dir, first_phase(), {"path": other_dir, "by_size": True})
    shutil.rmtree(other_dir)
    with pytest.raises(DataError, match="other"):
        source_of(dataset_dir, first_phase(), {"path": other_dir, "by_size": True})


def test_names_are_those_of_the_phase_s_dataset(dataset_dir: Path, other_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"mixture\.1 names the source 'pl', but .*other holds de, en"):
        _ = source_of(dataset_dir, first_phase(), {"path": other_dir, "weights": {"pl": 1}}).order
    with pytest.raises(ConfigError, match=r"the first phase reads data\.path: name its dataset there"):
        source_of(dataset_dir, {"path": other_dir, "by_size": True})
