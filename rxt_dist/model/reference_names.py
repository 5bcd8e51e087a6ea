"""The map between the reference implementation's parameter names and ours: the way in and out of published weights.

Reference state dicts come in parts (`decoder`, `encoder`, `mlm_head`, `memory_attention`); each name below lacks the
part's own prefix. `to_ours` renames and re-lays tensors, `to_reference` is its inverse. Layouts that differ:

- gated feed-forwards: the reference stores [linear | gate] halves, we store [gate | up]: halves change places;
- expert stacks: the reference stores w1 [E, D, 2F] and w2 [E, F, D] (x @ w), we store [E, 2F, D] and [E, D, F];
- shared experts: w1 likewise, w2 as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.errors import CheckpointError

Part = Literal["decoder", "encoder", "mlm_head", "memory_attention"]
Layout = Callable[[Tensor], Tensor]
Renames = dict[str, tuple[str, Layout, Layout]]


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _swap_rows(tensor: Tensor) -> Tensor:
    """[linear | gate] <-> [gate | linear] along the output axis of a Linear weight or bias."""
    return torch.cat(tensor.chunk(2, dim=0)[::-1], dim=0)


def _swap_last(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2, dim=-1)[::-1], dim=-1)


def _w1_in(tensor: Tensor) -> Tensor:
    return _swap_last(tensor).transpose(1, 2).contiguous()


def _w1_out(tensor: Tensor) -> Tensor:
    return _swap_last(tensor.transpose(1, 2)).contiguous()


def _transpose(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous()


# (reference suffix, our suffix, reference -> ours, ours -> reference), relative to one feed-forward.
_FEED_FORWARD: list[tuple[str, str, Layout, Layout]] = [
    ("fc1.linear.weight", "gate_up_proj.weight", _swap_rows, _swap_rows),
    ("fc1.linear.bias", "gate_up_proj.bias", _swap_rows, _swap_rows),
    ("fc2.weight", "down_proj.weight", _same, _same),
    ("fc2.bias", "down_proj.bias", _same, _same),
    ("router.gate.weight", "routed.gate.weight", _same, _same),
    ("w1", "routed.experts.gate_up_proj", _w1_in, _w1_out),
    ("w2", "routed.experts.down_proj", _transpose, _transpose),
    ("b1", "routed.experts.gate_up_bias", _swap_last, _swap_last),
    ("b2", "routed.experts.down_bias", _same, _same),
    ("global_bias", "global_bias", _same, _same),
    ("shared_w1", "shared.gate_up_proj", _w1_in, _w1_out),
    ("shared_w2", "shared.down_proj", _same, _same),
    ("shared_b1", "shared.gate_up_bias", _swap_last, _swap_last),
    ("shared_b2", "shared.down_bias", _same, _same),
    ("shared_experts_bias", "shared_bias", _same, _same),
    ("shared_expert_gate.weight", "shared.gate.weight", _same, _same),
]

_LAYER: list[tuple[str, str]] = [
    ("norm1.", "attention_norm."),
    ("norm2.", "cross_norm."),
    ("norm3.", "feed_forward_norm."),
    ("stm_norm.", "memory_norm."),
    ("attention.", "attention."),
    ("memory_cross_attention.", "cross_attention."),
]

_MEMORY: list[tuple[str, str]] = [
    ("attention_layers", "write_attention"),
    ("memory_norm_layers", "write_norm"),
    ("memory_input_norm_layers", "input_norm"),
    ("residual_gate_layers", "write_gate"),
    ("self_attention_layers", "inner_attention"),
    ("self_memory_norm_layers", "inner_norm"),
    ("self_residual_gate_layers", "inner_gate"),
    ("mean_attention_layers", "inner_attention"),
    ("mean_memory_norm_layers", "inner_norm"),
    ("mean_residual_gate_layers", "inner_gate"),
    ("interlayer_gate_layers", "mixing_gate"),
]


def _renames(config: ModelConfig, part: Part) -> Renames:
    """Every possible reference name of a part -> (our full name, layout in, layout out)."""
    if part == "mlm_head":
        pairs = {"dense": "dense", "layer_norm": "norm", "decoder": "output"}
        return {
            f"{theirs}.{field}": (f"mlm_head.{ours}.{field}", _same, _same)
            for theirs, ours in pairs.items()
            for field in ("weight", "bias")
        }
    if part == "memory_attention":
        return _memory_renames(config)
    found: Renames = {"model.embedding.weight": ("embedding.weight", _same, _same)}
    for theirs, ours in _layer_prefixes(config, part):
        for name, new, inwards, outwards in _FEED_FORWARD:
            found[f"{theirs}ff.{name}"] = (f"{ours}feed_forward.{new}", inwards, outwards)
        for name, new in _LAYER:
            for field in ("weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                          "out_proj.weight", "out_proj.bias"):  # fmt: skip
                found[f"{theirs}{name}{field}"] = (f"{ours}{new}{field}", _same, _same)
    if part == "decoder":
        for field in ("weight", "bias"):
            found[f"model.head.{field}"] = (f"lm_head.output.{field}", _same, _same)
            found[f"model.head_norm.{field}"] = (f"decoder.head_norm.{field}", _same, _same)
    return found


def _layer_prefixes(config: ModelConfig, part: Part) -> list[tuple[str, str]]:
    if part == "encoder":
        return [(f"model.layers.{i}.", f"encoder.layers.{i}.") for i in range(config.layers)]
    before, after = len(config.decoder.stateless_before), len(config.decoder.stateless_after)
    blocks = [("stateless_layers", before), ("layers", config.layers), ("final_stateless_layers", after)]
    names = [f"model.{block}.{i}." for block, count in blocks for i in range(count)]
    return [(name, f"decoder.layers.{i}.") for i, name in enumerate(names)]


def _memory_renames(config: ModelConfig) -> Renames:
    memory = config.memory_attention
    variant = memory.variant if memory else "simple"
    fields = ("weight", "bias", "q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "out_proj.bias")
    found: Renames = {"model.mean_stm_norm.weight": ("memory_attention.across_norm.weight", _same, _same)}
    for theirs, ours in _MEMORY:
        if (theirs.startswith("self_") and variant != "self") or (theirs.startswith("mean_") and variant == "self"):
            continue
        for i in range(config.layers):
            prefix, new = f"model.{theirs}.{i}.", f"memory_attention.layers.{i}.{ours}."
            if theirs.endswith("gate_layers"):
                found[f"{prefix}gate"] = (f"{new}weight", _same, _same)
                for field in ("weight", "bias"):
                    found[f"{prefix}gate.{field}"] = (f"{new}linear.{field}", _same, _same)
                    found[f"{prefix}slot_status.{field}"] = (f"{new}status.{field}", _same, _same)
            else:
                found |= {f"{prefix}{field}": (f"{new}{field}", _same, _same) for field in fields}
    return found


def to_ours(config: ModelConfig, part: Part, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and re-lay a part's reference state dict into ours.

    Raises:
        CheckpointError: for a tensor that this model has no place for.
    """
    renames = _renames(config, part)
    ours = {}
    for name, tensor in state.items():
        if re.search(r"(^|\.)(rope|rotary)\.", name):
            continue  # Tables of angles, which we compute.
        if name not in renames:
            raise CheckpointError(
                f"The {part} has a tensor '{name}' of shape {tuple(tensor.shape)} that model '{config.name}' has no "
                "place for. Check that the model file describes the system these weights belong to."
            )
        new, inwards, _ = renames[name]
        ours[new] = inwards(tensor)
    return ours


def to_reference(config: ModelConfig, part: Part, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part's tensors of our `state` under the reference's names and layouts; the inverse of `to_ours`."""
    return {
        theirs: outwards(state[ours]) for theirs, (ours, _, outwards) in _renames(config, part).items() if ours in state
    }
