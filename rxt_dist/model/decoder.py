"""The generating decoder: causal, mixture-of-experts, reading the memory through cross-attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rxt_dist.config.model import ModelConfig
from rxt_dist.model.attention import Documents, KeyValues, SparseQueryAttention
from rxt_dist.model.cache import OwnKeys
from rxt_dist.model.feedforward import DenseFeedForward
from rxt_dist.model.moe import MoEFeedForward, RoutingInputs, RoutingTerms
from rxt_dist.model.names import decoder_layer_kinds
from rxt_dist.model.norm_rope import Rotary, rms_norm, rotary


class DecoderOutput(NamedTuple):
    """hidden_BTD: residual stream after the last layer and the head norm; routing: terms of all MoE layers."""

    hidden_BTD: Tensor
    routing: RoutingTerms | None


class DecoderLayer(nn.Module):
    """x += SelfAttn(norm x); stateful, given a memory: x += CrossAttn(norm x, memory); x += FF(norm x)."""

    def __init__(self, config: ModelConfig, *, stateful: bool, moe: bool) -> None:
        super().__init__()
        decoder = config.decoder
        bias = decoder.attention_bias
        self.attention_norm = rms_norm(config)
        self.attention = SparseQueryAttention(config, decoder.self_attention, bias=bias)
        self.stateful = stateful
        if stateful:
            self.cross_norm = rms_norm(config)
            self.memory_norm = rms_norm(config)
            self.cross_attention = SparseQueryAttention(config, decoder.cross_attention, bias=bias)
        self.feed_forward_norm = rms_norm(config)
        self.is_moe = moe
        self.feed_forward = MoEFeedForward(config) if moe else DenseFeedForward(config.dim, decoder.dense_hidden)

    def forward(
        self,
        x_BTD: Tensor,
        rotate: Rotary,
        documents: Documents | None,
        memory_BSD: Tensor | None,
        memory_documents: Documents | None,
        valid_N: Tensor | None,
        load_E: Tensor | None,
    ) -> tuple[Tensor, RoutingTerms | None]:
        """[B, T, D] -> ([B, T, D], routing terms of an MoE layer)."""
        x_BTD = x_BTD + self.attention(
            self.attention_norm(x_BTD), rotate_q=rotate, rotate_k=rotate, causal=True, documents=documents
        )
        if memory_BSD is not None:
            x_BTD = x_BTD + self.cross_attention(
                self.cross_norm(x_BTD), self.memory_norm(memory_BSD), rotate_q=rotate, documents=memory_documents
            )
        return self._fed_forward(x_BTD, valid_N, load_E)

    def continued(self, x_BTD: Tensor, rotate: Rotary, own: OwnKeys, memory: KeyValues | None) -> Tensor:
        """`forward` for tokens that follow those whose keys and values `own` holds; theirs are added to it.

        Args:
            memory: keys and values of this layer's memory, as `memory_keys` gives them.
        """
        normed_BTD = self.attention_norm(x_BTD)
        keys, seen_BS = own.extended(self.attention.keys_values(normed_BTD, rotate))
        causal = seen_BS is None
        x_BTD = x_BTD + self.attention.read(normed_BTD, keys, rotate_q=rotate, causal=causal, keys_BS=seen_BS)
        if memory is not None:
            x_BTD = x_BTD + self.cross_attention.read(self.cross_norm(x_BTD), memory, rotate_q=rotate)
        return self._fed_forward(x_BTD, None, None)[0]

    def memory_keys(self, memory_BSD: Tensor) -> KeyValues:
        """What the cross-attention of a stateful layer reads of its memory [B, S, D]."""
        return self.cross_attention.keys_values(self.memory_norm(memory_BSD))

    def _fed_forward(
        self, x_BTD: Tensor, valid_N: Tensor | None, load_E: Tensor | None
    ) -> tuple[Tensor, RoutingTerms | None]:
        normed_BTD = self.feed_forward_norm(x_BTD)
        if not self.is_moe:
            return x_BTD + self.feed_forward(normed_BTD), None
        out_BTD, terms = self.feed_forward(normed_BTD, valid_N, load_E)
        return x_BTD + out_BTD, terms


class Decoder(nn.Module):
    """Stateless layers, L stateful layers (layer i reads memory layer i), stateless layers, head norm."""

    def __init__(self, config: ModelConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.layers = nn.ModuleList(
            DecoderLayer(config, stateful=stateful, moe=moe) for stateful, moe in decoder_layer_kinds(config)
        )
        norms = {"rms": lambda: rms_norm(config), "layer": lambda: nn.LayerNorm(config.dim), "none": nn.Identity}
        self.head_norm = norms[config.decoder.head_norm]()

    def forward(
        self,
        embedded_BTD: Tensor,
        positions_BT: Tensor,
        memory_LBSD: Tensor | None,
        *,
        documents: Documents | None = None,
        memory_documents: Documents | None = None,
        routing: RoutingInputs | None = None,
    ) -> DecoderOutput:
        """Decode embedded tokens while reading the memory.

        Args:
            embedded_BTD: embeddings.
            positions_BT: int64, position of each token in its document.
            memory_LBSD: the short-term memory; B may be 1 (one memory for all rows). None: cross-attention is passed
                over, as if every layer were stateless.
            documents: boundaries of packed documents for the self-attention.
            memory_documents: the same for the cross-attention, where memory slots are token positions
                (pre-training); without it every slot is visible.
            routing: what to account the routing against; without it the output has no routing terms.
        """
        rotate = rotary(self.config, positions_BT)
        x_BTD, stateful, moe, terms = embedded_BTD, 0, 0, []
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            memory_BSD = memory_LBSD[stateful] if layer.stateful and memory_LBSD is not None else None
            load_E = routing.load_ME[moe] if routing is not None and layer.is_moe else None
            valid_N = None if routing is None else routing.valid_N
            arguments = (x_BTD, rotate, documents, memory_BSD, memory_documents, valid_N, load_E)
            if self.recompute and torch.is_grad_enabled():
                x_BTD, term = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x_BTD, term = layer(*arguments)
            stateful += layer.stateful
            moe += layer.is_moe
            if term is not None:
                terms.append(term)
        return DecoderOutput(self.head_norm(x_BTD), _stack(terms))


def _stack(terms: list[RoutingTerms]) -> RoutingTerms | None:
    if not terms:
        return None
    return RoutingTerms(
        torch.stack([term.balance_M for term in terms]),
        torch.stack([term.z_M for term in terms]),
        torch.stack([term.counts_ME for term in terms]),
    )
