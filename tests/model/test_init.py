from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import model_config
from torch import nn

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.init import InitialWeights, initialise
from rxt_dist.model.reactive import ReactiveTransformer


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every uninitialised tensor is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    with poisoned_memory():
        model = ReactiveTransformer(config)
        initialise(model, seed)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def demo() -> dict[str, torch.Tensor]:
    return weights(model_config())


EVERYTHING_LOCAL = (
    "decoder.moe.bias=local",
    "decoder.moe.shared_bias=local",
    "decoder.attention_bias=true",
    "decoder.head_norm=layer",
    "memory_attention.gate={kind: linear, status: linear}",
)


@pytest.mark.parametrize("overrides", [(), EVERYTHING_LOCAL], ids=["beta", "local"])
def test_nothing_is_left_as_the_memory_happened_to_be(overrides: tuple[str, ...]) -> None:
    """Whatever stood in the parameters before, the same weights come out (gates with a configured start excepted)."""
    model = ReactiveTransformer(model_config(*overrides))
    gates = {name for name, _ in model.named_parameters() if name.endswith("gate.weight") and "memory_att" in name}
    gates -= {name for name in gates if ".linear." in name or ".status." in name}
    initialise(model, 0)
    first = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in gates:
                parameter.fill_(float("nan"))
    initialise(model, 0)
    for name, parameter in model.named_parameters():
        assert bool(torch.isfinite(parameter).all()), name
        assert torch.equal(parameter, first[name]), name


def test_no_uninitialised_memory_reaches_a_weight() -> None:
    for name, parameter in weights(model_config(*EVERYTHING_LOCAL)).items():
        assert bool(torch.isfinite(parameter).all()), name


def test_weights_do_not_depend_on_what_is_built_beside_them(demo: dict[str, torch.Tensor]) -> None:
    for overrides in (("memory_attention=null",), ("decoder.head_norm=layer",), ("encoder.hidden=64",)):
        for name, parameter in weights(model_config(*overrides)).items():
            if name in demo and demo[name].shape == parameter.shape and not name.startswith("decoder.head_norm"):
                assert torch.equal(parameter, demo[name]), name
    torch.manual_seed(99)
    assert all(torch.equal(parameter, demo[name]) for name, parameter in weights(model_config()).items())


def test_seeds_and_names_give_other_weights(demo: dict[str, torch.Tensor]) -> None:
    other = weights(model_config(), seed=1)
    random = [name for name, parameter in demo.items() if parameter.unique().numel() > 2]
    assert len(random) > 30
    assert not any(torch.equal(demo[name], other[name]) for name in random)
    seen = {tuple(demo[name].flatten()[:8].tolist()) for name in random}
    assert len(seen) == len(random), "two parameters hold the same numbers"


def test_scales(demo: dict[str, torch.Tensor]) -> None:
    width, layers = 32, {"decoder": 4, "encoder": 2}
    base = (5 * width) ** -0.5
    wanted = {"embedding.weight": 1.0, "lm_head.output.weight": base, "mlm_head.dense.weight": base}
    for part, depth in layers.items():
        for index in range(depth):
            layer = f"{part}.layers.{index}"
            wanted[f"{layer}.attention.q_proj.weight"] = base
            wanted[f"{layer}.attention.out_proj.weight"] = base / math.sqrt(2 * depth)
            wanted[f"{layer}.attention.gate_proj.weight"] = 0.02
            if f"{layer}.feed_forward.down_proj.weight" in demo:
                wanted[f"{layer}.feed_forward.gate_up_proj.weight"] = base
                wanted[f"{layer}.feed_forward.down_proj.weight"] = base / math.sqrt(2 * depth)
            else:
                for stack in ("routed.experts", "shared"):
                    wanted[f"{layer}.feed_forward.{stack}.gate_up_proj"] = base
                    wanted[f"{layer}.feed_forward.{stack}.down_proj"] = base / math.sqrt(2 * depth)
                wanted[f"{layer}.feed_forward.routed.gate.weight"] = base
    wanted["decoder.layers.1.cross_attention.out_proj.weight"] = base / math.sqrt(8)
    for name, deviation in wanted.items():
        spread = 5 / math.sqrt(2 * demo[name].numel())
        assert demo[name].std().item() == pytest.approx(deviation, rel=spread), name
        assert abs(demo[name].mean().item()) < 5 * deviation / math.sqrt(demo[name].numel()), name


def test_attention_gates_are_open_half_way_and_not_saturated(demo: dict[str, torch.Tensor]) -> None:
    """Fault F3 of published code: gates from N(1, 0.01), 84 % of them saturated at the start."""
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    gates = [parameter for name, parameter in demo.items() if name.endswith("attention.gate_proj.weight")]
    assert len(gates) == 4 + 2
    for gate in gates:
        assert torch.sigmoid(x @ gate.T).sub(0.5).abs().max().item() < 0.25


def test_norms_are_one_biases_zero_and_memory_gates_at_their_start(demo: dict[str, torch.Tensor]) -> None:
    counted = {"norm": 0, "bias": 0, "gate": 0}
    for name, parameter in demo.items():
        if name.endswith("norm.weight"):
            kind, value = "norm", 1.0
        elif name.endswith("bias"):
            kind, value = "bias", 0.0
        elif name.startswith("memory_attention") and name.endswith("_gate.weight"):
            kind, value = "gate", 3.0
        else:
            continue
        counted[kind] += 1
        assert parameter.unique().tolist() == [value], name
    assert min(counted.values()) >= 3 * 2


@pytest.mark.parametrize("size", [1, 15, 16, 17, 63, 64, 65, 79, 80, 81, 200])
def test_a_parameter_drawn_in_pieces_is_the_one_drawn_at_once(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law of torch's generator that pieces stand on; sizes around a drawing of 64 and its groups of 16."""
    model = nn.Module()
    model.layer = nn.Linear(size, 1, bias=False)
    model.config, model.decoder, model.encoder = model_config(), None, None  # type: ignore[assignment]
    network: Any = model
    whole, pieces, last = torch.empty(size), torch.full((size,), float("nan")), torch.empty(size - size // 2)
    InitialWeights(network, 3).fill([("layer.weight", 0, whole)])
    monkeypatch.setattr("rxt_dist.model.init._DRAWN", 64)
    first, second = size // 3, 2 * size // 3
    runs = [("layer.weight", second, pieces[second:]), ("layer.weight", 0, pieces[:first])]
    InitialWeights(network, 3).fill([*runs, ("layer.weight", first, pieces[first:second])])
    assert torch.equal(pieces, whole)
    InitialWeights(network, 3).fill([("layer.weight", size // 2, last)])
    assert torch.equal(last, whole[size // 2 :])
