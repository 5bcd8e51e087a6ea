"""Root-mean-square norm and rotary positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.fused import Chain


def rms_norm(config: ModelConfig) -> nn.RMSNorm:
    """Pre-norm over the residual width; epsilon None is the machine epsilon of the data type."""
    return RMSNorm(config.dim, eps=config.norm_eps)


class _RMSNorm(torch.autograd.Function):
    """x * r * weight with r = (mean x^2 + eps)^-1/2, in float32; keeps the input and r only."""

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x_BTD.float()
        r_BT1 = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x_BTD, weight_D, r_BT1)
        return (x * r_BT1).mul_(weight_D).to(x_BTD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BTD, weight_D, r_BT1 = ctx.saved_tensors
        normed = x_BTD.float() * r_BT1
        grad = grads[0].float()
        grad_times_normed = grad * normed
        mean_BT1 = (grad_times_normed @ weight_D.float().unsqueeze(1)).div_(x_BTD.shape[-1])
        grad_x = (grad * weight_D).addcmul_(normed, mean_BT1, value=-1).mul_(r_BT1)
        return grad_x.to(x_BTD.dtype), grad_times_normed.flatten(0, -2).sum(0).to(weight_D.dtype), None


def _norm_formula(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * weight_D.float()).to(x.dtype)


def _norm_eager(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x.is_cuda:
        return F.rms_norm(x, weight_D.shape, weight_D, eps)
    # torch's is a chain of ten operations on CPU that each keep their input. One function instead saves a quarter of
    # its time and one copy of the residual stream a norm (of two in bfloat16).
    normed: Tensor = _RMSNorm.apply(x, weight_D, eps)
    return normed


_norm = Chain(_norm_formula, _norm_eager)


class RMSNorm(nn.RMSNorm):
    """torch's, computed as a chain."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return _norm(x, self.weight, torch.finfo(x.dtype).eps if self.eps is None else self.eps)


def _rotate_formula(x_BTHd: Tensor, turn: Tensor) -> Tensor:
    real, imaginary = turn.unbind(-1)
    even, odd = x_BTHd.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * real - odd * imaginary, even * imaginary + odd * real), dim=-1)
    return turned.flatten(-2).to(x_BTHd.dtype)


def _rotate_eager(x_BTHd: Tensor, turn: Tensor) -> Tensor:
    # A complex product takes a third of the time of sines, cosines and swapped pairs.
    pairs = torch.view_as_complex(x_BTHd.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(turn)).flatten(-2).to(x_BTHd.dtype)


_rotate = Chain(_rotate_formula, _rotate_eager)


@dataclass(frozen=True)
class Rotary:
    """Rotations of one set of positions; shared by all layers of a forward pass.

    turn: float32 [B or 1, T, 1, d/2, 2], cosine and sine of each interleaved pair's angle.
    """

    turn: Tensor

    def __call__(self, x_BTHd: Tensor) -> Tensor:
        """Rotate pairs (2i, 2i+1) of the last axis by position; computed in float32, returned in the input's type."""
        return _rotate(x_BTHd, self.turn)


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
    return Rotary(torch.view_as_real(torch.polar(torch.ones_like(angles), angles).unsqueeze(2)))
