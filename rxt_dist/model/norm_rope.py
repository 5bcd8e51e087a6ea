"""Root-mean-square norm and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rxt_dist.config.model import ModelConfig


def rms_norm(config: ModelConfig) -> nn.RMSNorm:
    """Pre-norm over the residual width; epsilon None is the machine epsilon of the data type."""
    return nn.RMSNorm(config.dim, eps=config.norm_eps)


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines that rotate one set of positions; shared by all layers of a forward pass.

    Both are float32 [B or 1, T, 1, d], each angle repeated for its interleaved pair, the sine with the sign of its
    half folded in, so that a rotation is `x * cos + swap_pairs(x) * sin`.
    """

    cos: Tensor
    sin: Tensor

    def __call__(self, x_BTHd: Tensor) -> Tensor:
        """Rotate pairs (2i, 2i+1) of the last axis by position; computed in float32, returned in the input's type."""
        swapped = x_BTHd.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(x_BTHd * self.cos, swapped.float(), self.sin).to(x_BTHd.dtype)


def rotary(config: ModelConfig, positions_BT: Tensor) -> Rotary:
    """Rotary table of the given positions (int64 [B, T]): angle position * base^(-2i/d) for pair i.

    Angles are float32 whatever the model's type: in bfloat16 a query beyond position 4096 comes out 69 % off.
    `rope_angles: bfloat16` reproduces those angles for weights that were trained with them.
    """
    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, device=positions_BT.device, dtype=torch.float32) / dim
    angles = positions_BT.to(torch.float32).unsqueeze(-1) * config.rope_base**-exponents
    if config.rope_angles == "bfloat16":
        angles = angles.to(torch.bfloat16).float()
    angles = angles.repeat_interleave(2, dim=-1).unsqueeze(2)
    sign = torch.tensor([-1.0, 1.0], device=angles.device).repeat(dim // 2)
    return Rotary(cos=angles.cos(), sin=angles.sin() * sign)
