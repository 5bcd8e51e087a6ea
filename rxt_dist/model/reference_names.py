"""The map between the reference implementation's parameter names and ours: the way in and out of published weights.

Reference state dicts come in parts (`decoder`, `encoder`, `mlm_head`, `memory_attention`); each name below lacks the
part's own prefix. `to_ours` renames and re-lays tensors, `to_reference` is its inverse. Layouts that differ:

- gated feed-forwards: the reference stores [linear | gate] halves, we store [gate | up]: halves change places;
- expert stacks: the reference stores w1 [E, D, 2F] and w2 [E, F, D] (x @ w), we store [E, 2F, D] and [E, D, F];
- shared experts: w1 likewise, w2 as it is; a single one is two linear maps of its own;
- older systems keep each expert as a feed-forward of its own (the form "loop"), always with local biases, and give
  shared experts the width of routed ones.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.errors import CheckpointError

Part = Literal["decoder", "encoder", "mlm_head", "memory_attention"]
Form = Literal["stacked", "loop"]
Layout = Callable[[Tensor], Tensor]
# Tables of angles, which we compute, and the memory, which is no parameter.
_BUFFER = re.compile(r"(^|\.)(rope|rotary)\.|(^|\.)stm\.memory$")
_SHOWN = 4


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Entry:
    """The place of a reference tensor: one of our parameters, or one expert of it.

    inwards, outwards: layouts from the reference's to ours and back. form: in which form of experts the name occurs;
    None: in both.
    """

    ours: str
    inwards: Layout = _same
    outwards: Layout = _same
    expert: int | None = None
    form: Form | None = None


Entries = dict[str, Entry]


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
    return tensor.transpose(-2, -1).contiguous()


# (reference suffix, our suffix, reference -> ours, ours -> reference), relative to one feed-forward.
_FEED_FORWARD: list[tuple[str, str, Layout, Layout]] = [
    ("fc1.linear.weight", "gate_up_proj.weight", _swap_rows, _swap_rows),
    ("fc1.linear.bias", "gate_up_proj.bias", _swap_rows, _swap_rows),
    ("fc2.weight", "down_proj.weight", _same, _same),
    ("fc2.bias", "down_proj.bias", _same, _same),
    ("router.gate.weight", "routed.gate.weight", _same, _same),
    ("global_bias", "global_bias", _same, _same),
    ("shared_experts_bias", "shared_bias", _same, _same),
    ("shared_expert_gate.weight", "shared.gate.weight", _same, _same),
]
_STACKS: list[tuple[str, str, Layout, Layout]] = [
    ("w1", "routed.experts.gate_up_proj", _w1_in, _w1_out),
    ("w2", "routed.experts.down_proj", _transpose, _transpose),
    ("b1", "routed.experts.gate_up_bias", _swap_last, _swap_last),
    ("b2", "routed.experts.down_bias", _same, _same),
]
_SHARED_STACKS: list[tuple[str, str, Layout, Layout]] = [
    ("shared_w1", "shared.gate_up_proj", _w1_in, _w1_out),
    ("shared_w2", "shared.down_proj", _same, _same),
    ("shared_b1", "shared.gate_up_bias", _swap_last, _swap_last),
    ("shared_b2", "shared.down_bias", _same, _same),
]
# One expert that is a feed-forward of its own. Only down-projections of shared experts lie differently.
_EXPERT: list[tuple[str, str, Layout]] = [
    ("fc1.linear.weight", "gate_up_proj", _swap_rows),
    ("fc1.linear.bias", "gate_up_bias", _swap_rows),
    ("fc2.weight", "down_proj", _same),
    ("fc2.bias", "down_bias", _same),
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


def entries(config: ModelConfig, part: Part) -> Entries:
    """Every name that a tensor of this part may have, in either form of experts."""
    if part == "mlm_head":
        pairs = {"dense": "dense", "layer_norm": "norm", "decoder": "output"}
        return {
            f"{theirs}.{field}": Entry(f"mlm_head.{ours}.{field}")
            for theirs, ours in pairs.items()
            for field in ("weight", "bias")
        }
    if part == "memory_attention":
        return _memory_entries(config)
    found: Entries = {"model.embedding.weight": Entry("embedding.weight")}
    for theirs, ours in _layer_prefixes(config, part):
        for name, entry in _feed_forward(config):
            found[f"{theirs}ff.{name}"] = Entry(f"{ours}feed_forward.{entry.ours}", *_rest_of(entry))
        for name, new in _LAYER:
            for field in ("weight", "q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight",
                          "out_proj.weight", "out_proj.bias"):  # fmt: skip
                found[f"{theirs}{name}{field}"] = Entry(f"{ours}{new}{field}")
    if part == "decoder":
        for field in ("weight", "bias"):
            found[f"model.head.{field}"] = Entry(f"lm_head.output.{field}")
            found[f"model.head_norm.{field}"] = Entry(f"decoder.head_norm.{field}")
    return found


def _rest_of(entry: Entry) -> tuple[Layout, Layout, int | None, Form | None]:
    return entry.inwards, entry.outwards, entry.expert, entry.form


def _feed_forward(config: ModelConfig) -> Iterator[tuple[str, Entry]]:
    """Names and places of a feed-forward of any kind, relative to it."""
    moe = config.decoder.moe
    for name, ours, inwards, outwards in _FEED_FORWARD:
        yield name, Entry(ours, inwards, outwards)
    for name, ours, inwards, outwards in [*_STACKS, *(_SHARED_STACKS if moe.shared_experts > 1 else [])]:
        yield name, Entry(ours, inwards, outwards, form="stacked")
    if moe.shared_experts == 1:
        yield from _single_expert("shared_expert", "shared", 0, "stacked")
    for expert in range(moe.experts):
        yield from _single_expert(f"experts.{expert}", "routed.experts", expert, "loop")
    for expert in range(moe.shared_experts):
        yield from _single_expert(f"shared_experts.{expert}", "shared", expert, "loop")


def _single_expert(theirs: str, ours: str, expert: int, form: Form) -> Iterator[tuple[str, Entry]]:
    for name, field, layout in _EXPERT:
        turned = ours == "shared" and field == "down_proj"
        layout = _transpose if turned else layout
        yield f"{theirs}.{name}", Entry(f"{ours}.{field}", layout, layout, expert, form)


def _layer_prefixes(config: ModelConfig, part: Part) -> list[tuple[str, str]]:
    if part == "encoder":
        return [(f"model.layers.{i}.", f"encoder.layers.{i}.") for i in range(config.layers)]
    before, after = len(config.decoder.stateless_before), len(config.decoder.stateless_after)
    blocks = [("stateless_layers", before), ("layers", config.layers), ("final_stateless_layers", after)]
    names = [f"model.{block}.{i}." for block, count in blocks for i in range(count)]
    return [(name, f"decoder.layers.{i}.") for i, name in enumerate(names)]


def _memory_entries(config: ModelConfig) -> Entries:
    memory = config.memory_attention
    variant = memory.variant if memory else "simple"
    fields = ("weight", "bias", "q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "out_proj.bias")
    found: Entries = {"model.mean_stm_norm.weight": Entry("memory_attention.across_norm.weight")}
    for theirs, ours in _MEMORY:
        if (theirs.startswith("self_") and variant != "self") or (theirs.startswith("mean_") and variant == "self"):
            continue
        for i in range(config.layers):
            prefix, new = f"model.{theirs}.{i}.", f"memory_attention.layers.{i}.{ours}."
            if theirs.endswith("gate_layers"):
                found[f"{prefix}gate"] = Entry(f"{new}weight")
                for field in ("weight", "bias"):
                    found[f"{prefix}gate.{field}"] = Entry(f"{new}linear.{field}")
                    found[f"{prefix}slot_status.{field}"] = Entry(f"{new}status.{field}")
            else:
                found |= {f"{prefix}{field}": Entry(f"{new}{field}") for field in fields}
    return found


def is_buffer(name: str) -> bool:
    """Whether a reference tensor is none of its parameters, so that nothing is lost without it."""
    return _BUFFER.search(name) is not None


def expert_form(config: ModelConfig) -> Form:
    """The form in which published systems of this kind keep their experts."""
    moe = config.decoder.moe
    return "loop" if moe.bias == "local" and not moe.shared_experts else "stacked"


def exported(config: ModelConfig, part: Part, parameters: Collection[str], form: Form = "stacked") -> Entries:
    """The names that the part has in a published folder, given the names of our parameters."""
    return {
        theirs: entry
        for theirs, entry in entries(config, part).items()
        if entry.ours in parameters and entry.form in (None, form)
    }


def outward(entry: Entry, tensor: Tensor) -> Tensor:
    """The reference's tensor, taken from our whole parameter."""
    return entry.outwards(tensor if entry.expert is None else tensor[entry.expert])


def sources(config: ModelConfig, part: Part, names: Collection[str]) -> dict[str, list[tuple[str, Entry]]]:
    """Our parameters, each with the reference tensors that it is made of: one, or one for each expert, in order.

    Raises:
        CheckpointError: for a tensor that this model has no place for, that has another's place, or an expert without
            the others.
    """
    known, found = entries(config, part), defaultdict(list)
    unknown = [name for name in names if name not in known and not is_buffer(name)]
    if unknown:
        raise CheckpointError(
            f"The {part} has tensors that model '{config.name}' has no place for: {_listed(unknown)}. Check that the "
            "configuration describes the system these weights belong to."
        )
    for name in names:
        if name in known:
            found[known[name].ours].append((name, known[name]))
    moe = config.decoder.moe
    for ours, made_of in found.items():
        made_of.sort(key=lambda item: item[1].expert or 0)
        there = [entry.expert for _, entry in made_of]
        wanted = moe.shared_experts if ".shared." in ours else moe.experts
        if there != [None] and there != list(range(wanted)):
            raise CheckpointError(
                f"The {part} has '{ours}' in {len(made_of)} pieces ({_listed([name for name, _ in made_of])}), where "
                f"there must be one stack or {wanted} experts: the folder is incomplete, or two forms are mixed in it."
            )
    return dict(found)


def _listed(names: list[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def inward(made_of: list[tuple[str, Entry]], tensors: Mapping[str, Tensor]) -> Tensor:
    """Our parameter, made of reference tensors."""
    laid = [entry.inwards(tensors[name]) for name, entry in made_of]
    return laid[0] if made_of[0][1].expert is None else torch.stack(laid)


def to_ours(config: ModelConfig, part: Part, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and re-lay a part's reference state dict into ours.

    Raises:
        CheckpointError: see `sources`.
    """
    return {ours: inward(made_of, state) for ours, made_of in sources(config, part, state).items()}


def to_reference(
    config: ModelConfig, part: Part, state: Mapping[str, Tensor], form: Form = "stacked"
) -> dict[str, Tensor]:
    """The part's tensors of our `state` under the reference's names and layouts; the inverse of `to_ours`."""
    return {theirs: outward(entry, state[entry.ours]) for theirs, entry in exported(config, part, state, form).items()}
