"""The dense gated feed-forward."""

from __future__ import annotations

from torch import Tensor, nn

from rxt_dist.model.fused import swiglu


class DenseFeedForward(nn.Module):
    """W2 (SiLU(g) * u) + b2 with [g, u] = W1 x + b1; the gate half comes first everywhere in this package."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(dim, 2 * hidden)
        self.down_proj = nn.Linear(hidden, dim)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        return self.down_proj(swiglu(self.gate_up_proj(x_BTD)))
