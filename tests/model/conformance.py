"""The reference implementation's numbers and the tiny model that must reproduce them (tests/data/conformance)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.model.reference_names import to_ours

DATA = Path(__file__).parent.parent / "data" / "conformance"

CONFIG = ModelConfig.model_validate(
    {
        "name": "conformance",
        "dim": 64,
        "layers": 3,
        "heads": 16,
        "vocab_size": 97,
        "seq_len": 64,
        "stm_slots": 20,
        "rope_base": 100000,
        "norm_eps": None,
        "decoder": {
            "stateless_before": ["dense", "moe"],
            "stateless_after": ["moe", "moe"],
            "self_attention": {"query_heads": 8, "kv_heads": 4, "gated": True},
            "cross_attention": {"query_heads": 8, "kv_heads": 4},
            "dense_hidden": 160,
            "moe": {"experts": 8, "active": 3, "hidden": 24, "shared_experts": 2, "shared_hidden": 40},
        },
        "encoder": {"attention": {"query_heads": 8, "kv_heads": 8, "gated": True}, "hidden": 144},
    }
)


@cache
def vectors(name: str) -> dict[str, Tensor]:
    """All tensors of one file."""
    return load_file(DATA / f"{name}.safetensors")


def part_of(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def reference_model() -> ReactiveTransformer:
    """The tiny system with the reference's weights."""
    model = ReactiveTransformer(CONFIG)
    state: dict[str, Tensor] = {}
    for part in ("encoder", "decoder", "mlm_head"):
        state |= to_ours(CONFIG, part, part_of(vectors("weights"), f"{part}."))
    model.load_state_dict(state, strict=True)
    return model


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """|a - b| <= tolerance * max |b|."""
    worst = (actual.float() - expected.float()).abs().max().item()
    bound = tolerance * expected.abs().max().item()
    assert worst <= bound, f"{what}: off by {worst:.2e}, allowed {bound:.2e}"


def positions(tokens: int) -> Tensor:
    """0 ... T - 1 as [1, T]."""
    return torch.arange(tokens).unsqueeze(0)
