"""Sparse query attention (SQA) and which positions may see each other.

SQA projects to fewer query heads than the model has heads, so that attention runs in a narrower space (Filipek 2025,
arXiv 2510.01817). Packed documents never see each other; `Documents` says where they begin and end.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.model.fused import Chain
from rxt_dist.model.norm_rope import Rotary

# A dense mask costs T * T per row, one call per document about this many query-key pairs of overhead (measured on CPU).
_PAIRS_PER_CALL = 40_000
# Below this length torch's CPU kernel is slower in bfloat16 than in float32: backward takes 10.2 ms instead of 5.0 ms
# with 8 rows of 256 positions in 4 heads of 16. From here on it takes larger blocks and bfloat16 wins.
_CPU_BFLOAT16_TOKENS = 768


@dataclass(frozen=True)
class Documents:
    """Boundaries of the documents packed into a batch, over its flattened B * T tokens.

    cu_seqlens_N1: int32, starts of all documents and the end B * T; a row's padding counts as a document of its own.
    lengths: the same as host integers, so that no kernel launch waits for the device.
    """

    cu_seqlens_N1: Tensor
    lengths: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths)

    def mask(self, rows: int, *, causal: bool) -> Tensor:
        """bool [B, 1, T, T]: True where query and key belong to the same document of the same row.

        Made once and kept, since every layer of a pass asks for the same two masks.
        """
        kept = self._masks.get((rows, causal))
        if kept is None:
            kept = self._masks[rows, causal] = self._mask(rows).tril() if causal else self._mask(rows)
        return kept

    @cached_property
    def _masks(self) -> dict[tuple[int, bool], Tensor]:
        return {}

    def _mask(self, rows: int) -> Tensor:
        starts = self.cu_seqlens_N1[:-1].long()
        marks = torch.zeros(int(sum(self.lengths)), dtype=torch.int32, device=starts.device)
        ids_BT = marks.index_fill_(0, starts, 1).cumsum(0).view(rows, -1)
        return (ids_BT.unsqueeze(2) == ids_BT.unsqueeze(1)).unsqueeze(1)


def attend(
    q_BTHd: Tensor,
    k_BSGd: Tensor,
    v_BSGd: Tensor,
    *,
    causal: bool = False,
    documents: Documents | None = None,
    keys_BS: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt d) v with key head j serving query heads j * H/G ... (j + 1) * H/G - 1.

    Args:
        q_BTHd, k_BSGd, v_BSGd: projected heads; G divides H. B may be 1 in keys and values (one memory for all rows).
        causal: a query sees keys up to its own position.
        documents: queries and keys are the same packed positions; only keys of the query's document are seen.
        keys_BS: bool, False for keys that nobody may see (padding). Excludes `documents`.

    Returns:
        [B, T, H, d].
    """
    rows, tokens = q_BTHd.shape[:2]
    if documents is None or documents.lengths == (tokens,) * rows:
        # A document that fills its row needs no mask; with one, the kernel could not skip what lies after a query.
        mask = None if keys_BS is None else keys_BS[:, None, None, :]
        return _dense(q_BTHd, k_BSGd, v_BSGd, causal=causal, mask=mask)
    if q_BTHd.is_cuda and q_BTHd.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q_BTHd, k_BSGd, v_BSGd, documents, causal)
    pairs = sum(n * n for n in documents.lengths) + _PAIRS_PER_CALL * len(documents.lengths)
    if pairs < rows * tokens * tokens:
        return _per_document(q_BTHd, k_BSGd, v_BSGd, documents, causal)
    return _dense(q_BTHd, k_BSGd, v_BSGd, causal=False, mask=documents.mask(rows, causal=causal))


def _dense(q_BTHd: Tensor, k_BSGd: Tensor, v_BSGd: Tensor, *, causal: bool, mask: Tensor | None) -> Tensor:
    rows = q_BTHd.shape[0]
    if k_BSGd.shape[0] != rows:
        k_BSGd, v_BSGd = (x.expand(rows, -1, -1, -1) for x in (k_BSGd, v_BSGd))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BSGd, v_BSGd))
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] < _CPU_BFLOAT16_TOKENS:
        q, k, v = q.float(), k.float(), v.float()
    gqa = q.shape[1] != k.shape[1]
    output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)
    return output.transpose(1, 2).to(q_BTHd.dtype)


def _per_document(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, documents: Documents, causal: bool) -> Tensor:
    """One attention call per document: no work on pairs that the mask would discard."""
    pieces = [x.flatten(0, 1).unsqueeze(0).split(documents.lengths, dim=1) for x in (q_BTHd, k_BTGd, v_BTGd)]
    outputs = [_dense(q, k, v, causal=causal, mask=None) for q, k, v in zip(*pieces, strict=True)]
    return torch.cat(outputs, dim=1).view(q_BTHd.shape)


def _varlen(q_BTHd: Tensor, k_BTGd: Tensor, v_BTGd: Tensor, documents: Documents, causal: bool) -> Tensor:
    """FlashAttention over ragged documents (half precision on CUDA only)."""
    from torch.nn.attention.varlen import varlen_attn

    heads, key_heads = q_BTHd.shape[2], k_BTGd.shape[2]
    k, v = (x.flatten(0, 1) for x in (k_BTGd, v_BTGd))
    grouped: dict[str, Any] = {}
    if heads != key_heads and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        grouped["enable_gqa"] = True
    elif heads != key_heads:
        # The oldest torch we run on wants a key head for every query head.
        k, v = (x.repeat_interleave(heads // key_heads, dim=1) for x in (k, v))
    window = (-1, 0) if causal else (-1, -1)
    output = varlen_attn(
        q_BTHd.flatten(0, 1),
        k,
        v,
        documents.cu_seqlens_N1,
        documents.cu_seqlens_N1,
        documents.longest,
        documents.longest,
        window_size=window,
        **grouped,
    )
    assert isinstance(output, Tensor)
    return output.view(q_BTHd.shape)


class KeyValues(NamedTuple):
    """Projected keys (rotated, where they are) and values of one attention: [B, S, G, d] each."""

    k_BSGd: Tensor
    v_BSGd: Tensor


_gated = Chain(lambda heads, gate: heads * torch.sigmoid(gate))


class SparseQueryAttention(nn.Module):
    """SQA: q = Wq x in Hq heads, k and v in Hkv heads, optional sigmoid gate, out-projection back to D."""

    def __init__(self, config: ModelConfig, attention: AttentionConfig, *, bias: bool) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = attention.query_heads * self.head_dim, attention.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.dim, width, bias=False)
        self.k_proj = nn.Linear(config.dim, kv_width, bias=False)
        self.v_proj = nn.Linear(config.dim, kv_width, bias=False)
        self.gate_proj = nn.Linear(config.dim, width, bias=False) if attention.gated else None
        self.out_proj = nn.Linear(width, config.dim, bias=bias)

    def forward(
        self,
        x_BTD: Tensor,
        source_BSD: Tensor | None = None,
        *,
        rotate_q: Rotary | None = None,
        rotate_k: Rotary | None = None,
        causal: bool = False,
        documents: Documents | None = None,
        keys_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend from `x_BTD` to `source_BSD` (default: itself) and return [B, T, D]; masks as in `attend`."""
        keys = self.keys_values(x_BTD if source_BSD is None else source_BSD, rotate_k)
        return self.read(x_BTD, keys, rotate_q=rotate_q, causal=causal, documents=documents, keys_BS=keys_BS)

    def keys_values(self, source_BSD: Tensor, rotate_k: Rotary | None = None) -> KeyValues:
        """What `read` reads of a source [B, S, D]."""
        k = self.k_proj(source_BSD).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(source_BSD).unflatten(-1, (-1, self.head_dim))
        return KeyValues(k if rotate_k is None else rotate_k(k), v)

    def read(
        self,
        x_BTD: Tensor,
        keys: KeyValues,
        *,
        rotate_q: Rotary | None = None,
        causal: bool = False,
        documents: Documents | None = None,
        keys_BS: Tensor | None = None,
    ) -> Tensor:
        """Attend from `x_BTD` to keys and values that are there already: [B, T, D]; masks as in `attend`."""
        q = self.q_proj(x_BTD).unflatten(-1, (-1, self.head_dim))
        if rotate_q is not None:
            q = rotate_q(q)
        heads = attend(q, *keys, causal=causal, documents=documents, keys_BS=keys_BS).flatten(2)
        if self.gate_proj is not None:
            heads = _gated(heads, self.gate_proj(x_BTD))
        return self.out_proj(heads)
