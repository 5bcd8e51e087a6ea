"""Decoding token by token: an interaction as a decoder computes it, each token and the memory once."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.model.cache import OwnKeys
from rxt_dist.model.decoder import Decoder, DecoderLayer
from rxt_dist.model.norm_rope import rotary


class Decoding:
    """B interactions between two tokens.

    The memory does not change until the interaction ends, so that its keys and values are computed here, once.

    Args:
        memory_LBSD: the short-term memory; B may be 1. None: cross-attention is passed over.
        room: most tokens an interaction may come to.
        like: a tensor of the type and on the device of the decoder's inputs.
    """

    def __init__(self, decoder: Decoder, memory_LBSD: Tensor | None, rows: int, room: int, like: Tensor) -> None:
        self._decoder = decoder
        memory = iter(() if memory_LBSD is None else memory_LBSD.to(like))
        self._memory, self._own = [], []
        for layer in decoder.layers:
            assert isinstance(layer, DecoderLayer)
            has_memory = layer.stateful and memory_LBSD is not None
            self._memory.append(layer.memory_keys(next(memory)) if has_memory else None)
            attention = layer.attention
            kv_heads = attention.k_proj.out_features // attention.head_dim
            self._own.append(OwnKeys(rows, room, kv_heads, attention.head_dim, like))

    def prompt(self, embedded_BTD: Tensor) -> Tensor:
        """Hidden states [B, T, D] of the first tokens. Rows are padded at their ends; what is returned there means
        nothing."""
        return self._decode(embedded_BTD, torch.arange(embedded_BTD.shape[1], device=embedded_BTD.device)[None])

    def next(self, embedded_B1D: Tensor, positions: list[int]) -> Tensor:
        """Hidden states [B, 1, D] of one more token of each row, which stands at this position in it."""
        ends_B = torch.tensor(positions, device=embedded_B1D.device)
        for own in self._own:
            own.go_on(ends_B, max(positions))
        return self._decode(embedded_B1D, ends_B.unsqueeze(1))

    def _decode(self, x_BTD: Tensor, positions_BT: Tensor) -> Tensor:
        rotate = rotary(self._decoder.config, positions_BT)
        for layer, own, memory in zip(self._decoder.layers, self._own, self._memory, strict=True):
            assert isinstance(layer, DecoderLayer)
            x_BTD = layer.continued(x_BTD, rotate, own, memory)
        return self._decoder.head_norm(x_BTD)
