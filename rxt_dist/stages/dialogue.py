"""What stages that read dialogues turn by turn have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.data.masking import sample_seed
from rxt_dist.model.count import memory_attention_parameters
from rxt_dist.model.reactive import ReactiveTransformer


def keyed_normal(seed: int, stage: str, kind: str, sample: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 N(0, 1) of a shape: a function of (seed, stage, kind, sample) alone. CPU and CUDA generators differ."""
    generator = torch.Generator(device).manual_seed(sample_seed(seed, stage, kind, sample))
    return torch.randn(shape, generator=generator, device=device)


def write_turn(model: ReactiveTransformer, memory_LBSD: Tensor, encoded_LBTD: Tensor, keys_BT: Tensor) -> Tensor:
    """The next memory, float32 [L, B, S, D], of an encoded turn [L, B, T, D]; keys_BT: bool, False on padding."""
    assert model.memory_attention is not None
    positions_BT = torch.arange(keys_BT.shape[1], device=keys_BT.device).expand_as(keys_BT)
    written: Tensor = model.memory_attention(memory_LBSD.to(encoded_LBTD.dtype), encoded_LBTD, positions_BT, keys_BT)
    return written.float()


def memory_attention_flops(model: ModelConfig, writes: float, tokens: float) -> int:
    """Operations of training memory attention on so many writes of so many tokens in all, by the convention of
    model/flops.py; its weights meet each slot of the memory."""
    assert model.memory_attention is not None
    width = model.layers * model.memory_attention.attention.query_heads * model.head_dim
    weights = 6 * memory_attention_parameters(model) * round(writes) * model.stm_slots
    return weights + 12 * round(tokens * model.stm_slots * width)
