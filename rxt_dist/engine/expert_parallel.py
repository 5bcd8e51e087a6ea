"""Expert parallelism through DeepSpeed's AutoEP: how our routed block is handed over, and how its weights map back.

AutoEP replaces every `RoutedExperts` by a layer of its own that holds E / ep experts on each rank and exchanges tokens
by all-to-all. Its tensors are `router.gate.weight` (as ours), `experts.w1` (gate) and `experts.w3` (up), which stand
interleaved per expert in our `experts.gate_up_proj`, and `experts.w2` (our `experts.down_proj`). Biases, which
autoep.py adds to it, have our names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rxt_dist.config.model import ModelConfig
from rxt_dist.engine.interface import Fragment

_RENAMED = {
    "routed.router.gate.weight": "routed.gate.weight",
    "routed.experts.w1": "routed.experts.gate_up_proj",
    "routed.experts.w2": "routed.experts.down_proj",
    "routed.experts.w3": "routed.experts.gate_up_proj",
}
# The halves of each expert's gate_up_proj.
_HALVES = ("routed.experts.w1", "routed.experts.w3")


def autoep_config(expert_parallel: int) -> dict[str, Any]:
    """The `expert_parallel` section of DeepSpeed's config that matches our routed block."""
    return {
        "enabled": True,
        "autoep_size": expert_parallel,
        "moe_layer_pattern": r"stage\.model\.decoder\.layers\.\d+\.feed_forward\.routed",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_tok",
        "score_func": "softmax",
        "route_norm": True,
        "score_apply": "post",
        "use_grouped_mm": True,
    }


@dataclass(frozen=True)
class RoutedShape:
    """What AutoEP reads from `model.config`."""

    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int

    @staticmethod
    def of(config: ModelConfig) -> RoutedShape:
        """From our own configuration."""
        moe = config.decoder.moe
        return RoutedShape(moe.experts, moe.active, config.dim, moe.hidden)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether AutoEP split this parameter over ranks (its gradients are then reduced over fewer ranks)."""
    return getattr(parameter, "allreduce", True) is False


@dataclass(frozen=True)
class Piece:
    """A run of a rank's parameter, and where it lies in the model's own parameter (both flattened)."""

    name: str
    local_start: int
    start: int
    length: int


def pieces(name: str, parameter: nn.Parameter, expert_rank: int) -> Iterator[Piece]:
    """Where a parameter of the engine's module lies in ours; for all but AutoEP's experts that is one whole run.

    Args:
        name: its name in the engine's module.
        expert_rank: this rank's place in its expert-parallel group.
    """
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
    numel = 1
    for size in shape:
        numel *= size
    ours = model_name(name)
    if not is_expert(parameter):
        yield Piece(ours, 0, 0, numel)
        return
    local_experts, size = shape[0], numel // shape[0]
    first = expert_rank * local_experts
    half = next((half for half, ending in enumerate(_HALVES) if name.endswith(ending)), None)
    if half is None:
        yield Piece(ours, 0, first * size, numel)
        return
    for expert in range(local_experts):
        yield Piece(ours, expert * size, (2 * (first + expert) + half) * size, size)


def cut(
    name: str, parameter: nn.Parameter, expert_rank: int, offset: int, held: Mapping[str, Tensor]
) -> Iterator[Fragment]:
    """The pieces of the model's parameters that lie in a part of a parameter of the engine's module.

    Args:
        offset: where that part begins in the flattened parameter.
        held: views [n] of the part.
    """
    length = next(iter(held.values())).numel()
    for piece in pieces(name, parameter, expert_rank):
        first = max(offset, piece.local_start)
        last = min(offset + length, piece.local_start + piece.length)
        if first < last:
            views = {kind: tensor[first - offset : last - offset] for kind, tensor in held.items()}
            yield Fragment(piece.name, piece.start + first - piece.local_start, views)


def model_name(name: str) -> str:
    """The name in our model of a parameter of the engine's module (for decay patterns and reports)."""
    for ending, ours in _RENAMED.items():
        if name.endswith(ending):
            return name.removesuffix(ending) + ours
    return name
