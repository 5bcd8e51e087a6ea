"""Keys and values of an interaction's own tokens, so that each token is computed once.

A cache is an argument: whoever generates makes one for each layer, hands them to the decoder, and drops them when the
interaction ends. No module keeps one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.model.attention import KeyValues


class OwnKeys:
    """Keys and values of the tokens so far, of one layer, with room for more; filled in place.

    Rows may be of unequal lengths: each goes on where it ends, and what a shorter one's padding left behind is
    overwritten or not seen.

    Args:
        room: most tokens a row may come to.
    """

    def __init__(self, rows: int, room: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        shape = (rows, room, kv_heads, head_dim)
        # Zeros, since what is masked still meets a weight of zero, and whatever stood in memory may not be a number.
        self._k_BTGd = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self._v_BTGd = torch.zeros_like(self._k_BTGd)
        self._ends_B: Tensor | None = None
        self._longest = 0

    def go_on(self, ends_B: Tensor, longest: int) -> None:
        """From now on rows are extended by one token each, at these places (int64 [B]), of which `longest` is the
        largest."""
        self._ends_B, self._longest = ends_B, longest

    def extended(self, new: KeyValues) -> tuple[KeyValues, Tensor | None]:
        """Take in what follows; returns all that its queries may read, and which of it they see (bool [B, S]).

        The first tokens of all rows come at once and see each other causally: there the second is None.
        """
        if self._ends_B is None:
            tokens = new.k_BSGd.shape[1]
            self._k_BTGd[:, :tokens], self._v_BTGd[:, :tokens] = new
            return new, None
        rows_B = torch.arange(len(self._ends_B), device=self._ends_B.device)
        self._k_BTGd[rows_B, self._ends_B] = new.k_BSGd[:, 0]
        self._v_BTGd[rows_B, self._ends_B] = new.v_BSGd[:, 0]
        kept = slice(0, self._longest + 1)
        places_S = torch.arange(self._longest + 1, device=self._ends_B.device)
        return KeyValues(self._k_BTGd[:, kept], self._v_BTGd[:, kept]), places_S <= self._ends_B.unsqueeze(1)
