"""What a write of the memory stores for its backward pass, counted from the source of memory attention.

docs/plan.md has the table.
"""

from __future__ import annotations

from rxt_dist.config.model import MemoryAttentionConfig
from rxt_dist.plan.setting import FLOAT32_BYTES, Setting

# Tensors of the memory's width that a layer keeps whatever its gates are, and those that its gates keep.
_KEPT = {"simple": 2, "self": 4, "interlayer": 5, "self-interlayer": 5, "grouped": 5}
_GATED = {"simple": 1, "self": 2, "interlayer": 2, "self-interlayer": 3, "grouped": 3}


def memory_tensor_bytes(setting: Setting) -> int:
    """One memory of a micro-batch in float32, [L, B, S, D]."""
    model = setting.config.model
    return model.layers * setting.micro_rows * model.stm_slots * model.dim * FLOAT32_BYTES


def encoded_bytes(setting: Setting) -> int:
    """The encoder's outputs for a micro-batch, [L, B, T, D]."""
    model = setting.config.model
    return model.layers * setting.tokens * model.dim * setting.element_bytes


def write_bytes(setting: Setting) -> tuple[int, int]:
    """(stored, inside) of one layer's write, as in `Layer`."""
    model, memory = setting.config.model, setting.config.model.memory_attention
    assert memory is not None
    slots = setting.micro_rows * model.stm_slots
    width, keys = (heads * model.head_dim for heads in (memory.attention.query_heads, memory.attention.kv_heads))
    # The turn and its norm, keys and values; on the way back the gradients of the last three.
    stored: float = setting.tokens * 2 * (model.dim + keys)
    inside = setting.tokens * (model.dim + 2 * keys)
    # Queries and what they read, and the slots on their way.
    stored += slots * (2 * width + _slot_widths(memory, model.layers) * model.dim)
    inside += slots * (2 * width + 2 * model.dim)
    statistics = memory.attention.query_heads
    if memory.variant != "simple":
        inner = memory.inner_attention or memory.attention
        stored += slots * 2 * (inner.query_heads + inner.kv_heads) * model.head_dim
        statistics += inner.query_heads
    return round(stored * setting.element_bytes) + slots * statistics * FLOAT32_BYTES, inside * setting.element_bytes


def _slot_widths(memory: MemoryAttentionConfig, layers: int) -> float:
    """Tensors of the memory's width that one layer keeps of its slots."""
    gate = memory.gate
    by_gate = 0 if gate.kind == "none" else 1
    if gate.status == "linear" and gate.kind in ("elementwise", "linear"):
        by_gate += 1  # The sum of old and new, which the status is projected from.
    # The mean over layers before its norm: a copy for each layer of a group, one for all where there is one group.
    mean = 0.0 if memory.variant in ("simple", "self") else 1.0 if memory.groups > 1 else 1 / layers
    return _KEPT[memory.variant] + mean + by_gate * _GATED[memory.variant]
