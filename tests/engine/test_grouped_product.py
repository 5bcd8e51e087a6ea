"""The kernel of the experts' products fits the device, and gets what its documentation asks for."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import deepspeed.ops.triton_ops as triton_ops
import pytest
import torch
from tiny import DEMO
from torch import Tensor

from rxt_dist.config.load import load_model
from rxt_dist.engine.grouped_product import choose_grouped_product, triton_product
from rxt_dist.model.experts import Dispatch, ExpertStack, set_grouped_product, torch_product

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "triton", "expected"),
    [
        ((8, 0), True, triton_product),
        ((8, 6), True, triton_product),
        ((8, 0), False, torch_product),
        ((9, 0), True, torch_product),
        ((10, 0), True, torch_product),
    ],
)
def test_devices_before_hopper_take_the_triton_kernel(
    capability: tuple[int, int], triton: bool, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_ops, "is_triton_available", lambda: triton)
    assert choose_grouped_product(CUDA) is expected


def test_the_cpu_takes_torchs() -> None:
    assert choose_grouped_product(torch.device("cpu")) is torch_product


def kernel_by_its_documentation(rows: Tensor, weight: Tensor, ends: Tensor, trans_b: bool = False) -> Tensor:
    """Written out, with the refusals of the kernel; it runs on GPUs alone."""
    assert (rows.dim(), weight.dim(), ends.dim()) == (2, 3, 1)
    assert weight.is_contiguous()
    assert rows.dtype == weight.dtype
    assert ends.dtype == torch.int32
    weight = weight.transpose(1, 2) if trans_b else weight
    bounds = pairwise([0, *ends.tolist()])
    pieces = [rows[first:last] @ weight[index] for index, (first, last) in enumerate(bounds)]
    return torch.cat(pieces)


@pytest.mark.parametrize("bias", ["none", "local"])
def test_experts_are_the_same_by_either_kernel(bias: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_ops, "group_gemm_triton", kernel_by_its_documentation)
    model = load_model(DEMO, [f"decoder.moe.bias={bias}", "decoder.moe.experts=12"])
    generator = torch.Generator().manual_seed(0)
    experts = ExpertStack(16, model.decoder.moe)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(generator=generator)
    x_ND, weights_NK = torch.randn(30, 16, generator=generator), torch.rand(30, 2, generator=generator)
    selected_NK = torch.randint(0, 12, (30, 2), generator=generator)
    selected_NK[:, 1] = (selected_NK[:, 0] + 1) % 12
    results = []
    for product in (torch_product, triton_product):
        set_grouped_product(product)
        try:
            leaves = [x_ND.clone().requires_grad_(), weights_NK.clone().requires_grad_(), *experts.parameters()]
            dispatch = Dispatch.of(selected_NK, experts.num_experts)
            out_ND = experts._grouped(leaves[0], leaves[1], selected_NK, dispatch)
            results.append([out_ND, *torch.autograd.grad((out_ND * x_ND).sum(), leaves)])
        finally:
            set_grouped_product(torch_product)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
