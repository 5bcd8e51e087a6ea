"""Analytic parameter counts against the published systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxt_dist.config.load import load_model
from rxt_dist.model.count import (
    Count,
    count_parameters,
    count_system,
    memory_attention_parameters,
    residual_gate_parameters,
    routed_parameters,
)

MODELS = Path(__file__).parents[2] / "configs/model"
NONE = Count(0, 0)


@pytest.mark.parametrize(
    ("name", "decoder", "encoder", "mlm_head", "memory"),
    [
        ("rxt-beta", Count(2_841_937_920, 194_807_808), 96_958_976, 33_883_648, 22_332_416),
        ("rxt-beta-micro", Count(251_304_448, 41_432_576), 18_320_384, 8_290_304, 3_731_200),
        ("rxt-alpha-nano", Count(9_458_508, 3_521_868), 2_049_024, 984_268, 1_186_688),
        ("rxt-alpha-mini", Count(57_767_696, 13_584_144), 0, 0, 0),
    ],
)
def test_published_figures(name: str, decoder: Count, encoder: int, mlm_head: int, memory: int) -> None:
    counts = count_parameters(load_model(MODELS / f"{name}.yaml"))
    assert list(counts) == ["decoder", "encoder", "mlm_head", "memory_attention"]
    assert counts["decoder"] == decoder
    assert counts["encoder"] == Count(encoder, encoder)
    assert counts["mlm_head"] == Count(mlm_head, mlm_head)
    assert counts["memory_attention"] == Count(memory, memory)


def test_the_system_counts_its_embedding_once() -> None:
    beta = load_model(MODELS / "rxt-beta.yaml")
    assert count_system(beta).total == 2_927_674_880
    assert routed_parameters(beta) == 2_717_908_992
    mini = load_model(MODELS / "rxt-alpha-mini.yaml")
    assert count_system(mini) == count_parameters(mini)["decoder"]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_model_has_the_parameters_that_are_counted(path: Path) -> None:
    import torch

    from rxt_dist.model.reactive import ReactiveTransformer

    config = load_model(path)
    with torch.device("meta"):
        model = ReactiveTransformer(config)
    shared = config.vocab_size * config.dim if config.encoder else 0
    counted = sum(count.total for count in count_parameters(config).values()) - shared
    assert sum(parameter.numel() for parameter in model.parameters()) == counted


@pytest.mark.parametrize(
    ("variant", "groups", "attentions", "norms", "gates"),
    # Four layers; an attention is 4 * 128 * 64 + 128 numbers, a norm 128, a gate 64 slots; the norms are of all layers.
    [
        ("simple", 1, 1, 8, 1),
        ("self", 1, 2, 12, 2),
        ("interlayer", 1, 2, 13, 2),
        ("self-interlayer", 1, 2, 13, 3),
        ("grouped", 2, 2, 13, 3),
    ],
)
def test_memory_variants(variant: str, groups: int, attentions: int, norms: int, gates: int) -> None:
    overrides = [f"memory_attention.variant={variant}", f"memory_attention.groups={groups}"]
    model = load_model(MODELS / "demo.yaml", overrides)
    assert memory_attention_parameters(model) == 4 * (attentions * 32_896 + gates * 64) + norms * 128


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        ("{kind: none}", 0),
        ("{kind: elementwise}", 20),
        ("{kind: elementwise, per_slot: false}", 1),
        ("{kind: static, status: linear}", 20 + 65),
        ("{kind: linear}", 20 * 20 + 20),
        ("{kind: linear, per_slot: false}", 20 + 1),
        ("{kind: linear, status: linear}", 420 + 65),
    ],
)
def test_residual_gates(gate: str, expected: int) -> None:
    memory = load_model(MODELS / "demo.yaml", [f"memory_attention.gate={gate}"]).memory_attention
    assert memory is not None
    assert residual_gate_parameters(memory.gate, slots=20, dim=64) == expected
