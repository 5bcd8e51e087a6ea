"""The bidirectional encoder that reads interactions; its layer outputs are what memory attention writes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rxt_dist.config.model import EncoderConfig, ModelConfig
from rxt_dist.model.attention import Documents, SparseQueryAttention
from rxt_dist.model.feedforward import DenseFeedForward
from rxt_dist.model.norm_rope import Rotary, rms_norm, rotary


class EncoderLayer(nn.Module):
    """x += SelfAttn(norm x); x += FF(norm x)."""

    def __init__(self, config: ModelConfig, encoder: EncoderConfig) -> None:
        super().__init__()
        self.attention_norm = rms_norm(config)
        self.attention = SparseQueryAttention(config, encoder.attention, bias=encoder.attention_bias)
        self.feed_forward_norm = rms_norm(config)
        self.feed_forward = DenseFeedForward(config.dim, encoder.hidden)

    def forward(self, x_BTD: Tensor, rotate: Rotary, documents: Documents | None, keys_BT: Tensor | None) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD), rotate_q=rotate, rotate_k=rotate, documents=documents, keys_BS=keys_BT
        )
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class Encoder(nn.Module):
    """L dense bidirectional layers; returns the residual stream after each of them."""

    def __init__(self, config: ModelConfig, encoder: EncoderConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.layers = nn.ModuleList(EncoderLayer(config, encoder) for _ in range(config.layers))

    def forward(
        self,
        embedded_BTD: Tensor,
        positions_BT: Tensor,
        documents: Documents | None = None,
        keys_BT: Tensor | None = None,
    ) -> Tensor:
        """Encode embedded tokens.

        Args:
            embedded_BTD: embeddings of the interaction.
            positions_BT: int64, position of each token in its document.
            documents: boundaries of packed documents, which do not see each other.
            keys_BT: bool, False for padding (instead of `documents`).

        Returns:
            ED [L, B, T, D]: the raw residual stream after every layer, without a final norm.
        """
        rotate = rotary(self.config, positions_BT)
        outputs, x_BTD = [], embedded_BTD
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(layer, x_BTD, rotate, documents, keys_BT, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, rotate, documents, keys_BT)
            outputs.append(x_BTD)
        return torch.stack(outputs)
