from __future__ import annotations

import pytest
import torch
from tiny import model_config, run_config
from torch import nn

from rxt_dist.config.run import OptimizerConfig
from rxt_dist.engine.optimizer import adam_state, adamw, parameter_groups, set_learning_rate
from rxt_dist.errors import ConfigError
from rxt_dist.model.reactive import ReactiveTransformer


def groups_of(config: OptimizerConfig) -> tuple[dict[str, nn.Parameter], dict[float, set[int]]]:
    named = dict(ReactiveTransformer(model_config()).named_parameters())
    groups = parameter_groups(named.items(), config)
    return named, {group["weight_decay"]: {id(parameter) for parameter in group["params"]} for group in groups}


def test_norms_and_biases_do_not_decay_and_everything_else_does() -> None:
    named, groups = groups_of(OptimizerConfig(weight_decay=0.1))
    assert set(groups) == {0.1, 0.0}
    for name, parameter in named.items():
        spared = name.endswith(("norm.weight", ".bias"))
        assert (id(parameter) in groups[0.0]) is spared, name
        assert (id(parameter) in groups[0.1]) is not spared, name
    assert any("experts.gate_up_proj" in name and id(named[name]) in groups[0.1] for name in named)


def test_patterns_choose_what_does_not_decay() -> None:
    named, groups = groups_of(OptimizerConfig(no_decay=("^embedding", r"routed\.gate\.")))
    spared = {name for name, parameter in named.items() if id(parameter) in groups[0.0]}
    routers = {f"decoder.layers.{layer}.feed_forward.routed.gate.weight" for layer in (1, 2, 3)}
    assert spared == {"embedding.weight"} | routers


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no_decay has the pattern 'nrom', which matches none of the \d+ trained"):
        groups_of(OptimizerConfig(no_decay=(r"\.bias$", "nrom")))


def test_a_group_without_parameters_is_left_out() -> None:
    assert set(groups_of(OptimizerConfig(no_decay=()))[1]) == {0.1}
    assert set(groups_of(OptimizerConfig(no_decay=(".",)))[1]) == {0.0}


def test_decay_reaches_adamw_by_group() -> None:
    config = OptimizerConfig(weight_decay=0.5, no_decay=("spared",))
    named = {"decays": nn.Parameter(torch.ones(3)), "spared": nn.Parameter(torch.ones(3))}
    optimizer = adamw(parameter_groups(named.items(), config), config)
    set_learning_rate(optimizer, 0.1)
    for parameter in named.values():
        parameter.grad = torch.zeros(3)
    optimizer.step()
    assert named["decays"].tolist() == pytest.approx([1 - 0.1 * 0.5] * 3)
    assert named["spared"].tolist() == [1.0] * 3


def test_settings_and_learning_rate_arrive() -> None:
    config = run_config(lr=3e-4, beta1=0.8, beta2=0.9, eps=1e-6).optimizer
    optimizer = adamw(parameter_groups([("a.bias", nn.Parameter(torch.ones(1)))], OptimizerConfig(no_decay=())), config)
    set_learning_rate(optimizer, 7e-5)
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
