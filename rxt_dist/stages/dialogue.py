"""What stages that read dialogues turn by turn have in common."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.data.masking import sample_seed
from rxt_dist.model.count import memory_attention_parameters
from rxt_dist.model.memory import WrittenMemory
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.base import Term


def gate_terms(model: ModelConfig) -> tuple[Term, ...]:
    """For each layer of memory attention its mean gate, told as a term; none where old and new are only added."""
    assert model.memory_attention is not None
    if model.memory_attention.gate.kind == "none":
        return ()
    layers = range(1, model.layers + 1)
    return tuple(Term(f"gate-{layer}", f"gate of layer {layer}", by_view=True, detail=True) for layer in layers)


def keyed_normal(seed: int, stage: str, kind: str, sample: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """float32 N(0, 1) of a shape: a function of (seed, stage, kind, sample) alone. CPU and CUDA generators differ."""
    generator = torch.Generator(device).manual_seed(sample_seed(seed, stage, kind, sample))
    return torch.randn(shape, generator=generator, device=device)


def write_turn(model: ReactiveTransformer, memory_LBSD: Tensor, encoded_LBTD: Tensor, keys_BT: Tensor) -> WrittenMemory:
    """The next memory, in float32, and gates of an encoded turn [L, B, T, D]; keys_BT: bool, False on padding."""
    assert model.memory_attention is not None
    positions_BT = torch.arange(keys_BT.shape[1], device=keys_BT.device).expand_as(keys_BT)
    new_LBSD, gates_LB = model.memory_attention(memory_LBSD.to(encoded_LBTD.dtype), encoded_LBTD, positions_BT, keys_BT)
    return WrittenMemory(new_LBSD.float(), gates_LB)


def memory_attention_flops(model: ModelConfig, writes: float, tokens: float) -> int:
    """Operations of training memory attention on so many writes of so many tokens in all, by the convention of
    model/flops.py; its weights meet each slot of the memory."""
    assert model.memory_attention is not None
    width = model.layers * model.memory_attention.attention.query_heads * model.head_dim
    weights = 6 * memory_attention_parameters(model) * round(writes) * model.stm_slots
    return weights + 12 * round(tokens * model.stm_slots * width)
