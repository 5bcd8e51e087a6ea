"""Room for the weights of a network that was built without any."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tiny import run_config
from torch import nn

from rxt_dist.engine.materialise import materialise
from rxt_dist.stages.base import build_network

CPU = torch.device("cpu")


def without_weights() -> nn.Module:
    with torch.device("meta"):
        model = build_network(run_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("decoder" in name)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_gets_room_and_stays_what_it_was(dtype: torch.dtype) -> None:
    model = without_weights()
    before = {name: (value.shape, value.requires_grad) for name, value in model.named_parameters()}
    materialise(model, CPU, dtype)
    assert {name: (value.shape, value.requires_grad) for name, value in model.named_parameters()} == before
    for name, value in model.named_parameters():
        assert (value.device, value.dtype) == (CPU, dtype), name
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), name


def test_parameters_that_are_there_already_stay() -> None:
    model = build_network(run_config())
    before = dict(model.named_parameters())
    materialise(model, CPU, torch.bfloat16, split_experts=True)
    assert all(value is before[name] for name, value in model.named_parameters())


def test_experts_that_will_be_split_take_no_memory_and_are_not_divided() -> None:
    divided: list[nn.Parameter] = []

    def divide(parameters: Sequence[nn.Parameter]) -> None:
        assert parameters, "no module without parameters"
        divided.extend(parameters)

    model = without_weights()
    materialise(model, CPU, torch.float32, split_experts=True, divide=divide)
    experts = {name: value for name, value in model.named_parameters() if ".routed.experts." in name}
    assert len(experts) == 6
    for name, value in experts.items():
        assert value.untyped_storage().nbytes() == 4, name
    others = {id(value) for name, value in model.named_parameters() if name not in experts}
    assert {id(value) for value in divided} == others
    assert len(divided) == len(others), "each once"
