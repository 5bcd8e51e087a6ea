from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from tiny import DEMO, model_config, run_config
from torch import nn

from rxt_dist.config.load import load_model
from rxt_dist.config.run import OptimizerConfig
from rxt_dist.engine.optimizer import (
    adam_state,
    adamw,
    gradient_norm,
    parameter_groups,
    row_norms,
    set_learning_rates,
)
from rxt_dist.errors import ConfigError
from rxt_dist.model.reactive import ReactiveTransformer


def one_rate(name: str) -> str:
    return "all"


def groups_of(config: OptimizerConfig) -> tuple[dict[str, nn.Parameter], dict[float, set[int]]]:
    model = ReactiveTransformer(model_config())
    named = dict(model.named_parameters())
    groups = parameter_groups(named.items(), model.matrices, config, one_rate)
    return named, {group["weight_decay"]: {id(parameter) for parameter in group["params"]} for group in groups}


# Last parts of the names of all matrices, written down by hand; what is not here must not decay.
MATRICES = re.compile(
    r"(embedding|output|dense|[qkv]_proj|out_proj|gate_proj|gate_up_proj|down_proj|routed\.gate|shared\.gate|linear|status)"
    r"\.weight$|(routed\.experts|shared)\.(gate_up|down)_proj$"
)
BIASES = ("bias", "global_bias", "shared_bias", "gate_up_bias", "down_bias")
GATES = ("write_gate.weight", "inner_gate.weight", "mixing_gate.weight")
PUBLISHED = ("demo", "rxt-beta", "rxt-beta-micro", "rxt-alpha-nano", "rxt-alpha-mini")


@pytest.mark.parametrize("name", PUBLISHED)
def test_of_every_published_shape_the_matrices_decay_and_nothing_else(name: str) -> None:
    with torch.device("meta"):
        model = ReactiveTransformer(load_model(DEMO.with_name(f"{name}.yaml")))
    named = dict(model.named_parameters())
    decaying, spared = parameter_groups(named.items(), model.matrices, OptimizerConfig(weight_decay=0.1), one_rate)
    assert (decaying["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    by_id = {id(parameter): found for found, parameter in named.items()}
    decays = {by_id[id(parameter)] for parameter in decaying["params"]}
    spares = {by_id[id(parameter)] for parameter in spared["params"]}
    assert decays == {found for found in named if MATRICES.search(found)}
    assert spares == named.keys() - decays
    kinds = Counter(
        "norm" if "norm." in found else "gate" if found.endswith(GATES) else found.rsplit(".", 1)[-1]
        for found in spares
    )
    assert set(kinds) <= {"norm", "gate", *BIASES}
    if name == "rxt-beta":
        assert (kinds["global_bias"], kinds["shared_bias"], kinds["gate"]) == (24, 24, 3 * 21)
    if name == "rxt-beta-micro":
        assert (kinds["gate_up_bias"], kinds["down_bias"]) == (14, 14)


def test_a_step_without_gradients_moves_matrices_and_nothing_else() -> None:
    """Through the real optimizer: decay alone, on the shape with every kind of bias."""
    overrides = ("decoder.moe.bias=local", "decoder.moe.shared_bias=local", "decoder.head_norm=layer")
    model = ReactiveTransformer(model_config(*overrides, "decoder.attention_bias=true"))
    config = OptimizerConfig(weight_decay=0.5)
    optimizer = adamw(parameter_groups(model.named_parameters(), model.matrices, config, one_rate), config)
    set_learning_rates(optimizer, {"all": 0.1})
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        wanted = 1 - 0.1 * 0.5 if MATRICES.search(name) else 1.0
        torch.testing.assert_close(parameter.detach(), torch.full_like(parameter, wanted), msg=name)


def test_patterns_choose_matrices_that_do_not_decay_either() -> None:
    named, groups = groups_of(OptimizerConfig(no_decay=("^embedding", r"routed\.gate\.")))
    spared = {name for name, parameter in named.items() if id(parameter) in groups[0.0] and MATRICES.search(name)}
    routers = {f"decoder.layers.{layer}.feed_forward.routed.gate.weight" for layer in (1, 2, 3)}
    assert spared == {"embedding.weight"} | routers


@pytest.mark.parametrize("pattern", ["nrom", r"\.bias$"])
def test_a_pattern_that_matches_no_matrix_is_an_error(pattern: str) -> None:
    with pytest.raises(
        ConfigError, match=r"no_decay has the pattern .*, which matches none of the \d+ trained matrices"
    ):
        groups_of(OptimizerConfig(no_decay=("embedding", pattern)))


def test_a_group_without_parameters_is_left_out() -> None:
    assert set(groups_of(OptimizerConfig(no_decay=(".",)))[1]) == {0.0}


def test_decay_reaches_adamw_by_group() -> None:
    config = OptimizerConfig(weight_decay=0.5, no_decay=("spared",))
    named = {"decays": nn.Parameter(torch.ones(3)), "spared": nn.Parameter(torch.ones(3))}
    optimizer = adamw(parameter_groups(named.items(), named, config, one_rate), config)
    set_learning_rates(optimizer, {"all": 0.1})
    for parameter in named.values():
        parameter.grad = torch.zeros(3)
    optimizer.step()
    assert named["decays"].tolist() == pytest.approx([1 - 0.1 * 0.5] * 3)
    assert named["spared"].tolist() == [1.0] * 3


def test_settings_and_learning_rate_arrive() -> None:
    config = run_config(lr=3e-4, beta1=0.8, beta2=0.9, eps=1e-6).optimizer
    optimizer = adamw(parameter_groups([("a.bias", nn.Parameter(torch.ones(1)))], (), config, one_rate), config)
    set_learning_rates(optimizer, {"all": 7e-5})
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"], group["eps"], group["fused"]) == (7e-5, (0.8, 0.9), 1e-6, True)


def test_every_parameter_has_a_step_counter_of_its_own() -> None:
    parameters = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))]
    optimizer = adamw([{"params": parameters, "weight_decay": 0.0}], OptimizerConfig())
    for parameter in parameters:
        optimizer.state[parameter] = adam_state(parameter, 4)
        parameter.grad = torch.ones(2)
    optimizer.step()
    assert [optimizer.state[parameter]["step"].item() for parameter in parameters] == [5.0, 5.0]


def test_rates_have_groups_of_their_own_and_a_rate_of_zero_moves_nothing() -> None:
    """Neither decay nor the moments of earlier steps: parameters at rate 0 stay to the bit."""
    config = OptimizerConfig(weight_decay=0.5)
    named = {name: nn.Parameter(torch.ones(3)) for name in ("slow.weight", "slow.bias", "fast.weight")}
    matrices = {"slow.weight", "fast.weight"}
    groups = parameter_groups(named.items(), matrices, config, lambda name: name.split(".")[0])
    assert [(group["rate"], group["weight_decay"]) for group in groups] == [("slow", 0.5), ("slow", 0.0), ("fast", 0.5)]
    optimizer = adamw(groups, config)

    def step(rates: dict[str, float]) -> dict[str, list[float]]:
        set_learning_rates(optimizer, rates)
        for parameter in named.values():
            parameter.grad = torch.ones(3)
        optimizer.step()
        return {name: parameter.tolist() for name, parameter in named.items()}

    first = step({"slow": 0.1, "fast": 0.1})
    assert first["slow.weight"] == first["fast.weight"] == pytest.approx([1 - 0.05 - 0.1] * 3)
    assert first["slow.bias"] == pytest.approx([0.9] * 3)
    second = step({"slow": 0.0, "fast": 0.2})
    assert {name: second[name] for name in ("slow.weight", "slow.bias")} == {
        name: first[name] for name in ("slow.weight", "slow.bias")
    }
    assert second["fast.weight"] < first["fast.weight"]


@pytest.mark.parametrize("sizes", [[], [3], [4096], [1_000_000], [3_000_001, 5, 4097]])
def test_the_norm_of_many_gradients_is_that_of_float64(sizes: list[int]) -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(size) * 1e-3 for size in sizes]
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    assert float(gradient_norm(gradients)) == pytest.approx(expected, rel=1e-6)
    # The same in portions, each of them a norm of its rows.
    assert float(gradient_norm([row_norms(gradient) for gradient in gradients])) == pytest.approx(expected, rel=1e-6)
