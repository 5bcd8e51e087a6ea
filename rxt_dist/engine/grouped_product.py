"""Which kernel multiplies the rows of all experts at once on this device."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.model.experts import GroupedProduct, torch_product

# Compute capability of Hopper, from which on torch has a kernel of its own.
_HOPPER = (9, 0)


def choose_grouped_product(device: torch.device) -> GroupedProduct:
    """torch's grouped product, or DeepSpeed's Triton kernel on devices before Hopper.

    There torch loops over the experts, a product each, and copies their bounds to the host first (torch 2.11 to 2.13,
    aten/src/ATen/native/GroupedMMUtils.h): 384 small products and a wait where the kernel is one launch.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _HOPPER:
        return torch_product
    from deepspeed.ops.triton_ops import is_triton_available

    return triton_product if is_triton_available() else torch_product


def triton_product(rows_XK: Tensor, weight_ENK: Tensor, ends_E: Tensor) -> Tensor:
    """DeepSpeed's kernel; it wants weights without gaps."""
    from deepspeed.ops.triton_ops import group_gemm_triton

    product: Tensor = group_gemm_triton(rows_XK, weight_ENK.contiguous(), ends_E, trans_b=True)
    return product
