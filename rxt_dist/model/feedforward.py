"""The dense gated feed-forward."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DenseFeedForward(nn.Module):
    """W2 (SiLU(g) * u) + b2 with [g, u] = W1 x + b1; the gate half comes first everywhere in this package."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        gate, up = self.gate_up_proj(x_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
