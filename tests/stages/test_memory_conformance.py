"""Pre-training of memory attention against the reference's numbers: two steps, forward 1e-5 and gradients 1e-4."""

from __future__ import annotations

import pytest
import torch
from model.conformance import part_of, vectors
from tiny import relative, run_config

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.model.reference_names import to_ours
from rxt_dist.stages.dialogue import write_turn
from rxt_dist.stages.memory import MemoryStage, mixed_label, written_of

ATTENTION = {"query_heads": 5, "kv_heads": 5}
CONFIG = ModelConfig.model_validate(
    {
        "name": "conformance-memory",
        "dim": 40,
        "layers": 4,
        "heads": 10,
        "vocab_size": 71,
        "seq_len": 64,
        "stm_slots": 22,
        "rope_base": 100000,
        "norm_eps": None,
        "decoder": {
            "self_attention": {"query_heads": 4, "kv_heads": 2},
            "cross_attention": {"query_heads": 4, "kv_heads": 2},
            "moe": {"experts": 5, "active": 2, "hidden": 18},
        },
        "encoder": {"attention": {**ATTENTION, "gated": True}, "hidden": 72},
        "memory_attention": {"variant": "self-interlayer", "attention": ATTENTION},
    }
)


@pytest.fixture(scope="module")
def stage() -> MemoryStage:
    config = run_config(stage="memory", model=CONFIG)
    model = ReactiveTransformer(CONFIG, config.stage.parts())
    stored = vectors("mem_pretrain")
    state = to_ours(CONFIG, "encoder", part_of(stored, "encoder."))
    state |= to_ours(CONFIG, "memory_attention", part_of(stored, "w."))
    model.load_state_dict(state, strict=True)
    return MemoryStage(model, config)


@pytest.mark.parametrize("step", [0, 1])
def test_a_write_its_label_and_its_gradients_are_the_references(stage: MemoryStage, step: int) -> None:
    """The vectors have a token for each slot and count pads, so every turn passes for full when its label is made."""
    stored = vectors("mem_pretrain")
    given = part_of(stored, f"step{step}.")
    old = stored["stm0"] if step == 0 else stored["step0.stm"]
    share_old, share_new, noise_in, noise_label, factor = given["params"].tolist()
    assert share_old + share_new == pytest.approx(1)
    model, keys_BT = stage.model, given["mask"].bool()
    assert model.embedding is not None
    assert model.encoder is not None
    assert model.memory_attention is not None
    positions_BT = torch.arange(22).expand(3, -1)
    encoded = model.encoder(model.embedding(given["ids"]), positions_BT, keys_BT=keys_BT)
    assert not encoded.requires_grad
    assert relative(encoded[keys_BT.expand(4, -1, -1)], given["encoded"][keys_BT.expand(4, -1, -1)]) < 1e-5
    new, _ = write_turn(model, old, encoded + noise_in * given["noise_in"], keys_BT)
    slots = torch.arange(22).expand(3, -1)
    label = mixed_label(old, encoded, slots, torch.full((3,), share_new), None, unit=False)
    written = written_of(old, new, label + noise_label * given["noise_label"])
    loss = written.distance_B.mean() + factor * (step + 1) ** 0.5 * written.change_B.mean()
    assert relative(new, given["stm"]) < 1e-5
    assert relative(-written.distance_B.mean(), given["cos_mean"]) < 1e-5
    assert abs(loss.item() - given["loss"].item()) < 1e-5 * given["cos_mean"].item()
    model.zero_grad()
    loss.backward()
    wanted = to_ours(CONFIG, "memory_attention", part_of(given, "grad."))
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() == found.keys()
    for name, gradient in wanted.items():
        mine = found[name]
        assert mine is not None
        assert relative(mine, gradient) < 1e-4, name
