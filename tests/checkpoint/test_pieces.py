"""Pieces of a checkpoint are found wherever they are, and no file is opened before something is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import extended  # noqa: F401  (stages that only tests have)
import pytest
import torch
from safetensors.torch import save_file
from tiny import make_stage, run_config

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import ROUTING_FILE, SavedPieces, rank_file
from rxt_dist.checkpoint.state import load_state, save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError

WHOLE = torch.arange(12.0)
# Which elements of one parameter each rank wrote.
SHARES = ((0, 5), (5, 9), (9, 12))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Any:
    for rank, (first, last) in enumerate(SHARES):
        save_file({f"weight|w|{first}": WHOLE[first:last].clone()}, tmp_path / rank_file(rank))
    save_file({"load": torch.ones(2)}, tmp_path / ROUTING_FILE)
    names = [ROUTING_FILE, *(rank_file(rank) for rank in range(len(SHARES)))]
    return SimpleNamespace(path=tmp_path, files=[SimpleNamespace(name=name) for name in names])


def filled(saved: SavedPieces, first: int, last: int) -> list[float]:
    target = torch.full((last - first,), -1.0)
    saved.fill("weight", "w", first, target)
    return target.tolist()


@pytest.mark.parametrize("rank", range(3))
def test_a_rank_that_goes_on_reads_its_own_file_alone(rank: int, checkpoint: Any) -> None:
    for other in set(range(3)) - {rank}:
        (checkpoint.path / rank_file(other)).unlink()
    saved = SavedPieces(checkpoint, own=rank_file(rank))
    assert filled(saved, *SHARES[rank]) == list(range(*SHARES[rank]))
    assert saved.names_so_far == {"w"}


@pytest.mark.parametrize(("first", "last"), [(0, 12), (3, 11), (8, 10), (11, 12), (4, 5)])
@pytest.mark.parametrize("own", ["", rank_file(1), rank_file(9)])
def test_a_rank_of_another_layout_finds_what_it_needs(first: int, last: int, own: str, checkpoint: Any) -> None:
    assert filled(SavedPieces(checkpoint, own), first, last) == list(range(first, last))


def test_all_places_are_those_of_all_files(checkpoint: Any) -> None:
    saved = SavedPieces(checkpoint, own=rank_file(2))
    assert saved.names_so_far == set()
    assert saved.places == {("weight", "w")}


@pytest.mark.parametrize(("kind", "name", "first"), [("weight", "w", 10), ("weight", "v", 0), ("exp_avg", "w", 0)])
def test_what_no_file_holds_is_said(kind: str, name: str, first: int, checkpoint: Any) -> None:
    with pytest.raises(CheckpointError, match=f"lacks elements .* of '{name}' .{kind}."):
        SavedPieces(checkpoint).fill(kind, name, first, torch.empty(5))


def test_a_model_that_lacks_saved_parameters_is_refused(tmp_path: Path) -> None:
    device = torch.device("cpu")
    whole, store = make_stage(run_config()), CheckpointStore(tmp_path, 2)
    engine = PlainEngine(whole, run_config(), device)
    save_state(engine, FrozenWeights(whole.model, engine.ranks), store, 1, {})
    checkpoint = store.latest_valid(print)
    assert checkpoint is not None
    part = make_stage(run_config(stage="lm"))
    frozen = FrozenWeights(part.model, engine.ranks)
    with pytest.raises(CheckpointError, match=r"holds 'encoder\..*' and [1-9]\d* more parameters"):
        load_state(PlainEngine(part, part.run, device), frozen, checkpoint, 1)
