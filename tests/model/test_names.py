"""Names and sizes of parameters from the configuration, against networks that are built."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rxt_dist.config.load import load_model
from rxt_dist.model.names import parameter_sizes
from rxt_dist.model.reactive import ReactiveTransformer, described_parts

MODELS = Path(__file__).parents[2] / "configs/model"
GATE = "memory_attention.gate"
LOCAL = ["decoder.moe.bias=local", "decoder.moe.shared_bias=local", "decoder.moe.shared_experts=1"]
VARIANTS = {
    "local biases": LOCAL,
    "no biases": ["decoder.moe.bias=none", "decoder.moe.shared_bias=none", "decoder.attention_bias=true"],
    "no shared experts": ["decoder.moe.shared_experts=0", "decoder.moe.shared_hidden=0", "decoder.head_norm=layer"],
    "no head norm": ["decoder.head_norm=none", "encoder.attention_bias=true"],
    "simple memory": ["memory_attention.variant=simple", "memory_attention.groups=1", f"{GATE}.kind=none"],
    "self memory": ["memory_attention.variant=self", "memory_attention.groups=1", f"{GATE}.kind=static"],
    "interlayer": ["memory_attention.variant=interlayer", "memory_attention.groups=1", f"{GATE}.kind=linear"],
    "one gate": [f"{GATE}.per_slot=false", f"{GATE}.status=linear"],
    "one linear gate": [f"{GATE}.per_slot=false", f"{GATE}.kind=linear"],
    "other inner attention": ["memory_attention.inner_attention={query_heads: 2, kv_heads: 1}"],
}


def compare(path: Path, changes: list[str]) -> None:
    model = load_model(path, changes)
    parts = described_parts(model)
    with torch.device("meta"):
        built = ReactiveTransformer(model, parts)
    assert parameter_sizes(model, parts) == {name: value.numel() for name, value in built.named_parameters()}


@pytest.mark.parametrize("name", sorted(path.stem for path in MODELS.glob("*.yaml")))
def test_of_every_published_model(name: str) -> None:
    compare(MODELS / f"{name}.yaml", [])


@pytest.mark.parametrize("name", VARIANTS)
def test_of_every_variant(name: str) -> None:
    compare(MODELS / "demo.yaml", VARIANTS[name])


def test_only_of_the_parts_that_are_built() -> None:
    model = load_model(MODELS / "demo.yaml")
    assert set(parameter_sizes(model, ("embedding",))) == {"embedding.weight"}
    assert all(name.startswith(("encoder.", "mlm_head.")) for name in parameter_sizes(model, ("encoder", "mlm_head")))
