"""Memory attention: writes an encoded interaction into the short-term memory.

The memory is a value [L, B, S, D]. Writing returns the next memory; nothing is stored in a module and nothing is
changed in place.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from rxt_dist.config.model import MemoryAttentionConfig, ModelConfig, ResidualGateConfig
from rxt_dist.model.attention import SparseQueryAttention
from rxt_dist.model.norm_rope import Rotary, rms_norm, rotary


class WrittenMemory(NamedTuple):
    """memory_LBSD: the next memory. gates_LB: float32, without a gradient: the mean over slots of the gate by which a
    layer weighs what it has read against what it had; 0 where there is no gate."""

    memory_LBSD: Tensor
    gates_LB: Tensor


class ResidualGate(nn.Module):
    """R(old, new): weighs old against new memory by a gate g computed from their sum.

    sigmoid: g * new + (1 - g) * old; tanh: (1 + g) * new + (1 - g) * old; kind 'none': old + new.
    """

    def __init__(self, config: ModelConfig, gate: ResidualGateConfig) -> None:
        super().__init__()
        self.kind, self.activation, self.per_slot = gate.kind, gate.activation, gate.per_slot
        self.init = gate.init
        slots = config.stm_slots
        if gate.kind == "linear":
            self.linear = nn.Linear(slots, slots if gate.per_slot else 1)
        elif gate.kind != "none":
            self.weight = nn.Parameter(torch.empty((slots, 1) if gate.per_slot else (1,)))
        self.status = nn.Linear(config.dim, 1) if gate.status == "linear" else None

    def forward(self, old_BSD: Tensor, new_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S, D], [B, S, D] -> [B, S, D], and the gate, of a shape that broadcasts to [B, S, 1]; 0 of none."""
        total_BSD = old_BSD + new_BSD
        if self.kind == "none":
            return total_BSD, total_BSD.new_zeros(1)
        gate_BS1 = self._gate(total_BSD)
        if self.activation == "tanh":
            gate_BS1 = torch.tanh(gate_BS1)
            return (1 + gate_BS1) * new_BSD + (1 - gate_BS1) * old_BSD, gate_BS1
        gate_BS1 = torch.sigmoid(gate_BS1)
        return torch.lerp(old_BSD, new_BSD, gate_BS1), gate_BS1

    def _gate(self, total_BSD: Tensor) -> Tensor:
        if self.kind == "static":
            return self.weight
        status_BS1 = total_BSD.mean(-1, keepdim=True) if self.status is None else self.status(total_BSD)
        if self.kind == "elementwise":
            # One gate per layer looks at the whole memory: the mean status of its slots.
            return self.weight * (status_BS1 if self.per_slot else status_BS1.mean(1, keepdim=True))
        return self.linear(status_BS1.squeeze(-1)).unsqueeze(-1)


class MemoryWriteLayer(nn.Module):
    """One layer's write: slots first exchange what the variant says, then read the encoded interaction."""

    def __init__(self, config: ModelConfig, memory: MemoryAttentionConfig) -> None:
        super().__init__()
        self.variant = memory.variant
        self.write_norm = rms_norm(config)
        self.input_norm = rms_norm(config)
        self.write_attention = SparseQueryAttention(config, memory.attention, bias=True)
        self.write_gate = ResidualGate(config, memory.gate)
        if self.variant != "simple":
            inner = memory.inner_attention or memory.attention
            self.inner_norm = rms_norm(config)
            self.inner_attention = SparseQueryAttention(config, inner, bias=True)
            self.inner_gate = ResidualGate(config, memory.gate)
        if self.variant in ("self-interlayer", "grouped"):
            self.mixing_gate = ResidualGate(config, memory.gate)

    def forward(
        self, old_BSD: Tensor, across_BSD: Tensor | None, data_BTD: Tensor, rotate_k: Rotary, keys_BT: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Next memory of this layer [B, S, D], and the mean of its gate [B], float32 without a gradient.

        Args:
            old_BSD: this layer's memory.
            across_BSD: normed mean over layers of the old memory (interlayer variants).
            data_BTD: the encoder's output at this layer.
            rotate_k: rotary positions of the encoded tokens.
            keys_BT: bool, False for padding.
        """
        mixed_BSD = old_BSD if self.variant == "simple" else self._exchange(old_BSD, across_BSD)
        read_BSD = self.write_attention(
            self.write_norm(mixed_BSD), self.input_norm(data_BTD), rotate_k=rotate_k, keys_BS=keys_BT
        )
        new_BSD, gate_BS1 = self.write_gate(mixed_BSD, read_BSD)
        return new_BSD, gate_BS1.detach().float().expand(*new_BSD.shape[:2], 1).mean((1, 2))

    def _exchange(self, old_BSD: Tensor, across_BSD: Tensor | None) -> Tensor:
        normed_BSD = self.inner_norm(old_BSD)
        source_BSD = normed_BSD
        if across_BSD is not None:
            source_BSD = across_BSD if self.variant == "interlayer" else self.mixing_gate(normed_BSD, across_BSD)[0]
        exchanged_BSD: Tensor = self.inner_gate(old_BSD, self.inner_attention(normed_BSD, source_BSD))[0]
        return exchanged_BSD


class MemoryAttention(nn.Module):
    """L independent write layers; all read the old memory."""

    def __init__(self, config: ModelConfig, memory: MemoryAttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.groups = memory.groups
        self.layers = nn.ModuleList(MemoryWriteLayer(config, memory) for _ in range(config.layers))
        interlayer = memory.variant in ("interlayer", "self-interlayer", "grouped")
        self.across_norm = rms_norm(config) if interlayer else None

    def forward(
        self, memory_LBSD: Tensor, data_LBTD: Tensor, positions_BT: Tensor, keys_BT: Tensor | None = None
    ) -> WrittenMemory:
        """Write one interaction: memory [L, B, S, D] and encoded data [L, B, T, D].

        Args:
            positions_BT: int64 positions of the encoded tokens.
            keys_BT: bool, False for padding.
        """
        rotate_k = rotary(self.config, positions_BT)
        across_LBSD = None
        if self.across_norm is not None:
            grouped = memory_LBSD.unflatten(0, (self.groups, -1))
            across_LBSD = self.across_norm(grouped.mean(1, keepdim=True).expand_as(grouped).flatten(0, 1))
        written = [
            layer(memory_LBSD[i], None if across_LBSD is None else across_LBSD[i], data_LBTD[i], rotate_k, keys_BT)
            for i, layer in enumerate(self.layers)
        ]
        memories, gates = zip(*written, strict=True)
        return WrittenMemory(torch.stack(memories), torch.stack(gates))


def initial_memory(config: ModelConfig, rows: int, generator: torch.Generator | None = None) -> Tensor:
    """A fresh memory [L, B, S, D], N(0, 1)."""
    return torch.randn(config.layers, rows, config.stm_slots, config.dim, generator=generator)
