"""Weights that a stage does not train: shared out among ranks once, kept as they were, saved without moments."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import make_stage, packed_batch, run_config
from torch import Tensor, nn

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.state import load_state, save_state, state_checksum
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import ALL, JointConfig
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError
from rxt_dist.stages.base import Stage

CPU = torch.device("cpu")
FROZEN = ("encoder.", "mlm_head.")


class FrozenEncoder(JointConfig):
    """Everything but the encoder is trained."""

    def rate_group(self, parameter: str) -> str | None:
        return None if parameter.startswith(FROZEN) else ALL


class Parts(nn.Module):
    """Two frozen parameters, which three ranks cannot share evenly, and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.arange(7.0).view(7, 1), requires_grad=False)
        self.pair = nn.Parameter(torch.tensor([10.0, 11.0]), requires_grad=False)
        self.trained = nn.Parameter(torch.tensor([20.0, 21.0]))


def shares_of(model: nn.Module, world: int) -> list[FrozenWeights]:
    places: list[Any] = [SimpleNamespace(rank=rank, world_size=world) for rank in range(world)]
    return [FrozenWeights(model, place) for place in places]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_among_all_ranks_every_element_is_saved_once_at_its_place(world: int) -> None:
    model = Parts()
    gathered: dict[str, list[tuple[int, float]]] = {"matrix": [], "pair": []}
    for share in shares_of(model, world):
        assert share.model_names == {name for name, _ in model.named_parameters()}, "whatever a rank holds of them"
        for fragment in share.fragments():
            assert fragment.tensors.keys() == {"weight"}, "what is not trained has no moments"
            values = fragment.tensors["weight"].tolist()
            assert values, "a rank without a share saves no empty piece"
            gathered[fragment.name] += enumerate(values, fragment.start)
    assert sorted(gathered["matrix"]) == list(enumerate(range(7)))
    assert sorted(gathered["pair"]) == [(0, 10.0), (1, 11.0)]


def test_ranks_hold_equal_shares() -> None:
    sizes = [
        sum(fragment.tensors["weight"].numel() for fragment in share.fragments()) for share in shares_of(Parts(), 3)
    ]
    assert max(sizes) - min(sizes) <= 2


def test_what_an_engine_does_to_the_model_afterwards_does_not_reach_them() -> None:
    model = Parts()
    (share,) = shares_of(model, 1)
    with torch.no_grad():
        model.matrix.zero_()
    model.to(torch.bfloat16)
    found = {fragment.name: fragment.tensors["weight"] for fragment in share.fragments()}
    assert found["matrix"].tolist() == list(range(7))
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def frozen_of(stage: Stage) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in stage.model.named_parameters() if not value.requires_grad}


def engine_of(stage: Stage, config: RunConfig) -> tuple[PlainEngine, FrozenWeights]:
    frozen = FrozenWeights(stage.model, Collectives(CPU))
    return PlainEngine(stage, config, CPU), frozen


def trained_and_saved(directory: Path, config: RunConfig) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint after one step in bfloat16, and the frozen weights as they were before any engine had them."""
    stage = make_stage(config)
    before = frozen_of(stage)
    engine, frozen = engine_of(stage, config)
    engine.train_step([stage.prepare(packed_batch(), 0)], {ALL: 1e-2})
    store = CheckpointStore(directory, 2)
    save_state(engine, frozen, store, 1, {})
    checkpoint = store.latest_valid(pytest.fail)
    assert checkpoint is not None
    return checkpoint, before


def test_a_checkpoint_holds_the_float32_originals_of_a_bfloat16_run(tmp_path: Path) -> None:
    config = run_config(stage=FrozenEncoder, precision="bfloat16")
    checkpoint, before = trained_and_saved(tmp_path, config)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in before.values()), "rounding would show"
    with safe_open(checkpoint.path / "rank-00000.safetensors", "pt") as file:
        kinds: dict[str, set[str]] = {}
        for key in file.keys():  # noqa: SIM118 - not a dict
            kind, name, start = key.split("|")
            kinds.setdefault(name, set()).add(kind)
            if name in before:
                assert start == "0"
                assert torch.equal(file.get_tensor(key), before[name].flatten()), name
    stage = make_stage(config)
    assert kinds.keys() == {name for name, _ in stage.model.named_parameters()}
    for name, found in kinds.items():
        assert found == ({"weight"} if name.startswith(FROZEN) else {"weight", "exp_avg", "exp_avg_sq"}), name


def test_a_run_resumes_with_frozen_weights_from_its_checkpoint_alone(tmp_path: Path) -> None:
    config = run_config(stage=FrozenEncoder, precision="bfloat16")
    checkpoint, before = trained_and_saved(tmp_path, config)
    stage = make_stage(config.model_copy(update={"seed": 1}))
    assert any(not torch.equal(value, before[name]) for name, value in frozen_of(stage).items())
    engine, frozen = engine_of(stage, config)
    load_state(engine, frozen, checkpoint, 1)
    for name, value in frozen_of(stage).items():
        assert torch.equal(value, before[name].bfloat16()), name
    for fragment in frozen.fragments():
        assert torch.equal(fragment.tensors["weight"], before[fragment.name].flatten()), fragment.name
    assert state_checksum(engine, frozen) == checkpoint.meta["state_checksum"]


def test_frozen_weights_of_another_run_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksum of a state is also that of what nobody trains."""
    config = run_config(stage=FrozenEncoder)
    checkpoint, _ = trained_and_saved(tmp_path, config)
    engine, frozen = engine_of(make_stage(config), config)
    fill = SavedPieces.fill

    def careless(self: SavedPieces, kind: str, name: str, start: int, target: Tensor) -> None:
        fill(self, kind, name, start, target)
        if name == "encoder.layers.0.attention.q_proj.weight":
            target += 1

    monkeypatch.setattr(SavedPieces, "fill", careless)
    with pytest.raises(CheckpointError, match="weights or moments went to the wrong place"):
        load_state(engine, frozen, checkpoint, 1)


def test_a_checkpoint_that_lacks_a_frozen_weight_is_refused(tmp_path: Path) -> None:
    class WithoutEncoder(FrozenEncoder):
        """Has no encoder to save: another stage's checkpoint."""

        def parts(self) -> Any:
            return ("embedding", "decoder", "lm_head")

    config = run_config(stage=WithoutEncoder)
    stage = make_stage(config)
    engine, frozen = engine_of(stage, config)
    store = CheckpointStore(tmp_path, 2)
    save_state(engine, frozen, store, 1, {})
    checkpoint = store.latest_valid(pytest.fail)
    assert checkpoint is not None
    config = run_config(stage=FrozenEncoder)
    engine, frozen = engine_of(make_stage(config), config)
    with pytest.raises(CheckpointError, match=r"lacks elements 0 to \d+ of 'encoder\."):
        load_state(engine, frozen, checkpoint, 1)


def test_weights_that_turned_from_trained_to_frozen_are_found_in_an_older_checkpoint(tmp_path: Path) -> None:
    """Moments that the checkpoint holds besides are not asked for."""
    config = run_config()
    checkpoint, _ = trained_and_saved(tmp_path, config)
    with torch.device("meta"):
        stage = make_stage(run_config(stage=FrozenEncoder))
    frozen, saved = FrozenWeights(stage.model, Collectives(CPU)), SavedPieces(checkpoint)
    with safe_open(checkpoint.path / "rank-00000.safetensors", "pt") as file:
        for fragment in frozen.fragments():
            saved.fill("weight", fragment.name, fragment.start, fragment.tensors["weight"])
            assert torch.equal(fragment.tensors["weight"], file.get_tensor(f"weight|{fragment.name}|0"))
