"""Biases of split experts, on rows as AutoEP lays them out, against a loop over experts written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from tiny import make_stage, model_config, run_config
from torch import Tensor, nn

from rxt_dist.engine.autoep import BiasedExperts, our_layers
from rxt_dist.engine.expert_parallel import RoutedShape, autoep_config
from rxt_dist.engine.routing import routed_blocks

EXPERTS, WIDTH, HIDDEN = 3, 8, 16
# Rows of each expert with their filling, and rows of nobody after them.
COUNTS, NOBODY = (8, 24, 16), 8


@pytest.fixture
def experts() -> BiasedExperts:
    torch.manual_seed(0)
    made = BiasedExperts(WIDTH, HIDDEN, EXPERTS)
    for weight in (made.w1, made.w2, made.w3):
        torch.nn.init.normal_(weight, std=0.3)
    for name, value in (
        ("allreduce", False),
        ("group_name", "ep_size_2"),
        ("ds_zero_placement_family", "autoep_expert"),
        ("ds_zero_partition_group_name", "ep_size_2"),
    ):
        setattr(made.w1, name, value)
    made.take_biases(torch.randn(EXPERTS, 2 * HIDDEN), torch.randn(EXPERTS, WIDTH))
    return made


def written_out(experts: BiasedExperts, x_XD: Tensor) -> Tensor:
    blocks = []
    for expert, rows_XD in enumerate(x_XD.split(COUNTS)):
        gate_F, up_F = experts.gate_up_bias[expert].chunk(2)
        act_XF = F.silu(F.linear(rows_XD, experts.w1[expert], gate_F)) * F.linear(rows_XD, experts.w3[expert], up_F)
        blocks.append(F.linear(act_XF, experts.w2[expert], experts.down_bias[expert]))
    return torch.cat(blocks)


def test_every_row_gets_the_biases_of_its_expert(experts: BiasedExperts) -> None:
    taken = sum(COUNTS)
    x_XD, weight_XD = torch.randn(2, taken, WIDTH)
    # Rows of nobody hold whatever was in memory.
    whole_XD = torch.cat([x_XD, torch.full((NOBODY, WIDTH), float("nan"))]).requires_grad_()
    actual_XD = experts(whole_XD, torch.tensor(COUNTS, dtype=torch.int32))[:taken]
    (actual_XD * weight_XD).sum().backward()
    actual = {name: parameter.grad for name, parameter in experts.named_parameters()}
    experts.zero_grad()
    expected_XD = written_out(experts, x_XD)
    (expected_XD * weight_XD).sum().backward()
    torch.testing.assert_close(actual_XD, expected_XD)
    for name, parameter in experts.named_parameters():
        torch.testing.assert_close(actual[name], parameter.grad, msg=name)


def test_biases_are_marked_as_the_weights_of_experts(experts: BiasedExperts) -> None:
    for bias in (experts.gate_up_bias, experts.down_bias):
        assert bias.allreduce is False
        assert bias.group_name == bias.ds_zero_partition_group_name == "ep_size_2"
        assert bias.ds_zero_placement_family == "autoep_expert"
        assert bias.requires_grad


def test_each_rank_takes_the_biases_of_its_own_experts() -> None:
    """The blocks of two ranks, made as DeepSpeed makes them, hold what the whole block held."""
    held = []
    for rank in range(2):
        stage = make_stage(run_config(model=model_config("decoder.moe.bias=local")))
        whole = routed_blocks(stage.model)[0].experts
        for bias in (whole.gate_up_bias, whole.down_bias):
            bias.data = torch.arange(bias.numel()).float().view_as(bias)
        model = nn.Module()
        model.stage, model.config = stage, RoutedShape.of(stage.run.model)
        builder = AutoEP(model, parse_autoep_config(autoep_config(2)))
        with our_layers():
            builder.replace_moe_layers(builder.ep_parser(), ep_size=2, ep_rank=rank)
        held.append(routed_blocks(stage.model)[0].experts)
        assert held[-1].gate_up_bias.allreduce is held[-1].w1.allreduce is False
    for name in ("gate_up_bias", "down_bias"):
        assert torch.equal(torch.cat([getattr(each, name) for each in held]), getattr(whole, name)), name
