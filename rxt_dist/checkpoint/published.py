"""Folders of the reference implementation's format as they are published: their parts, and the model that they are of.

What a configuration leaves out has the reference's own default, and versions differ in what they write. So the shape of
the system is read off the tensors, and a configuration that says something else is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from rxt_dist.checkpoint.reference_config import part_arguments
from rxt_dist.config.model import ModelConfig
from rxt_dist.errors import CheckpointError
from rxt_dist.model.reference_names import Part, is_buffer

PARTS: tuple[Part, ...] = ("decoder", "encoder", "memory_attention", "mlm_head")
_CONFIGS: dict[str, Part] = {
    "decoder_config": "decoder",
    "encoder_config": "encoder",
    "memory_attention_config": "memory_attention",
}
# What this program computes; the reference can be told otherwise. An absent key is one of these.
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "use_gated": (True,),
    "ff_activation": ("silu", "swish"),
    "use_rms_norm": (True,),
    "use_nope": (False,),
    "use_gated_cross_attention": (False, None),
    "gated_attention_activation": ("sigmoid",),
    "moe_use_weighted_shared_experts": (False,),
    "attn_layer_types": (None,),
    "stateless_attn_layer_types": (None,),
    "final_stateless_attn_layer_types": (None,),
    "norm_type": ("classic-rms",),
    "disable_residual": (False,),
}

# Keys that the shapes of tensors answer, too.
_SHAPES = (
    *("num_layers", "embed_dim", "vocab_size", "ff_dim", "num_experts", "num_shared_experts", "use_head_norm"),
    *("att_groups", "att_query_groups", "cross_att_groups", "cross_att_query_groups", "use_gated_attention"),
    *("use_attention_output_bias", "stateless_layers_config", "final_stateless_layers_config"),
    *("interlayer_att_groups", "interlayer_att_query_groups", "self_att_groups", "self_att_query_groups"),
)


@dataclass(frozen=True)
class Stored:
    """A tensor of a file: where it lies, its shape, its type as safetensors names it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PublishedPart:
    """One part: the configuration it was built with, and its tensors without buffers, by the part's own names."""

    part: Part
    folder: Path
    config: Mapping[str, Any]
    tensors: dict[str, Stored] = field(default_factory=dict)
    buffers: int = 0

    def rows(self, name: str) -> int:
        """Length of a tensor's first axis."""
        return self.shape(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """Raise CheckpointError if there is no such tensor."""
        if name not in self.tensors:
            raise CheckpointError(f"{self.folder} lacks the tensor '{name}' of its {self.part}: it is incomplete.")
        return self.tensors[name].shape

    def says(self, key: str, default: Any) -> Any:
        """A value of the configuration."""
        return self.config.get(key, default)


def read_published(folders: Collection[Path]) -> dict[Part, PublishedPart]:
    """The parts in these folders: each a part, a whole system, or a folder of such folders.

    Raises:
        CheckpointError: a folder holds none, cannot be read, or holds something that this program does not compute; a
            part is there twice.
    """
    found: dict[Part, PublishedPart] = {}
    for folder in (place for given in folders for place in _places(given)):
        config = _config(folder)
        stored = _tensors(folder)
        parts = list(_whole(folder, config, stored) if "decoder_config" in config else [_part(folder, config, stored)])
        for part in parts:
            if part.part in found:
                raise CheckpointError(f"{folder} and {found[part.part].folder} both hold the {part.part}: name one.")
            _require_computed(part)
            found[part.part] = part
    return found


def _places(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    places = [folder] if (folder / "config.json").is_file() else []
    places += sorted(path.parent for path in folder.glob("*/config.json"))
    if not places and (folder / "export.json").is_file():
        raise CheckpointError(
            f"{folder} is an export of this program already, which needs no import: `rxt-dist chat` and "
            "`start: {export: ...}` take it as it is."
        )
    if not places:
        raise CheckpointError(
            f"{folder} has no config.json, and no folder in it has one, so nothing says what its weights are of. Name "
            "a folder of a published model."
        )
    return places


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no configuration, but {type(config).__name__}.")
    return config


def _tensors(folder: Path) -> dict[str, Stored]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        pickled = [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        why = f"only {', '.join(pickled)}, which is pickled: loading it could run any program" if pickled else "none"
        raise CheckpointError(f"{folder} must hold weights as .safetensors, but has {why}. Get them as safetensors.")
    found: dict[str, Stored] = {}
    for path in paths:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if name in found:
                        raise CheckpointError(f"{folder} holds '{name}' twice; the second time in {path.name}.")
                    slices = file.get_slice(name)
                    found[name] = Stored(path, name, tuple(slices.get_shape()), slices.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error}): get it again.") from error
    return found


def _whole(folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]) -> Iterator[PublishedPart]:
    left = dict(stored)
    for key, part in _CONFIGS.items():
        own = {name: left.pop(name) for name in stored if name.startswith(f"{part}.")}
        named = {name.removeprefix(f"{part}."): tensor for name, tensor in own.items()}
        if named:
            yield _without_buffers(part, folder, config.get(key) or {}, named)
    if left:
        raise CheckpointError(f"{folder} holds '{next(iter(left))}', which is no part of a whole system.")


def _part(folder: Path, config: Mapping[str, Any], stored: dict[str, Stored]) -> PublishedPart:
    """By its tensors: configurations of different parts may look alike."""
    if "model.head.weight" in stored:
        return _without_buffers("decoder", folder, config, stored)
    if any(name.startswith("model.memory_norm_layers.") for name in stored):
        return _without_buffers("memory_attention", folder, config, stored)
    if "layer_norm.weight" in stored:
        return _without_buffers("mlm_head", folder, config, stored)
    if "model.layers.0.norm1.weight" in stored:
        return _without_buffers("encoder", folder, config, stored)
    raise CheckpointError(
        f"{folder} holds no part of a Reactive Transformer: neither decoder, encoder, memory attention nor MLM head. "
        f"Its first tensors are {', '.join(list(stored)[:3])}."
    )


def _without_buffers(
    part: Part, folder: Path, config: Mapping[str, Any], stored: Mapping[str, Stored]
) -> PublishedPart:
    kept = {name: tensor for name, tensor in stored.items() if not is_buffer(name)}
    return PublishedPart(part, folder, config, kept, len(stored) - len(kept))


def _require_computed(part: PublishedPart) -> None:
    for key, computed in _COMPUTED.items():
        if key in part.config and part.config[key] not in computed:
            raise CheckpointError(
                f"{part.folder} says {key}={json.dumps(part.config[key])} of its {part.part}, but this program "
                f"computes {key}={json.dumps(computed[0])} only."
            )


# ---------------------------------------------------------------------------------------------------------------------
# The model that parts are of
# ---------------------------------------------------------------------------------------------------------------------


def describe(
    parts: Mapping[Part, PublishedPart], name: str, rope_angles: Literal["float32", "bfloat16"]
) -> ModelConfig:
    """The configuration of the system that these parts make up.

    Raises:
        CheckpointError: there is no decoder, a tensor that decides the shape is missing, or what a configuration says
            and the shapes of its tensors differ.
    """
    if "decoder" not in parts:
        raise CheckpointError("There is no decoder among the folders, and a model has one: name its folder too.")
    try:
        model = ModelConfig.model_validate(_values(parts, name, rope_angles))
    except (ValueError, TypeError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{parts['decoder'].folder} describes a model that cannot be: {error}") from error
    for part in parts.values():
        _require_agreement(part, model)
    return model


def _values(parts: Mapping[Part, PublishedPart], name: str, rope_angles: str) -> dict[str, Any]:
    decoder = parts["decoder"]
    vocab_size, dim = decoder.shape("model.head.weight")
    heads = decoder.says("att_heads", 16)
    values: dict[str, Any] = {
        "name": name,
        "dim": dim,
        "vocab_size": vocab_size,
        "layers": _count(decoder.tensors, "model.layers."),
        "heads": heads,
        "seq_len": decoder.says("seq_len", 1024),
        "stm_slots": decoder.says("stm_size", 1024),
        "rope_base": float(decoder.says("rope_base", 10000)),
        "rope_angles": rope_angles,
        "norm_eps": None,
        "decoder": _decoder(decoder, dim // heads),
    }
    if "encoder" in parts:
        values["encoder"] = _encoder(parts["encoder"], dim // heads)
    if "memory_attention" in parts:
        values["memory_attention"] = _memory(parts["memory_attention"], dim // heads)
    return values


def _require_agreement(part: PublishedPart, model: ModelConfig) -> None:
    """What a configuration says of shapes is what the tensors have."""
    for key, own in part_arguments(model, part.part).items():
        said = part.config.get(key)
        if key in _SHAPES and said is not None and said != own:
            raise CheckpointError(
                f"{part.folder}/config.json says {key}={json.dumps(said)} of the {part.part}, but the tensors there "
                f"have {json.dumps(own)}: one of them is of another model, or a tensor has the wrong shape."
            )


def _count(names: Collection[str], prefix: str) -> int:
    """How many layers there are in a block."""
    found = {int(name[len(prefix) :].split(".")[0]) for name in names if re.match(re.escape(prefix) + r"\d+\.", name)}
    return max(found, default=-1) + 1


def _attention(part: PublishedPart, prefix: str, head_dim: int) -> dict[str, Any]:
    return {
        "query_heads": part.rows(f"{prefix}q_proj.weight") // head_dim,
        "kv_heads": part.rows(f"{prefix}k_proj.weight") // head_dim,
        "gated": f"{prefix}gate_proj.weight" in part.tensors,
    }


def _decoder(part: PublishedPart, head_dim: int) -> dict[str, Any]:
    blocks = ("stateless_layers", "final_stateless_layers")
    kinds = {block: [_kind(part, f"model.{block}.{i}.ff.") for i in range(_layers(part, block))] for block in blocks}
    places = [f"model.{block}.{i}.ff." for block in blocks for i, kind in enumerate(kinds[block]) if kind == "dense"]
    norm = "none"
    if "model.head_norm.weight" in part.tensors:
        norm = "layer" if "model.head_norm.bias" in part.tensors else "rms"
    return {
        "stateless_before": kinds["stateless_layers"],
        "stateless_after": kinds["final_stateless_layers"],
        "self_attention": _attention(part, "model.layers.0.attention.", head_dim),
        "cross_attention": _attention(part, "model.layers.0.memory_cross_attention.", head_dim),
        "attention_bias": "model.layers.0.attention.out_proj.bias" in part.tensors,
        "dense_hidden": part.rows(f"{places[0]}fc1.linear.weight") // 2 if places else 0,
        "moe": _experts(part, "model.layers.0.ff."),
        "head_norm": norm,
    }


def _layers(part: PublishedPart, block: str) -> int:
    return _count(part.tensors, f"model.{block}.")


def _kind(part: PublishedPart, prefix: str) -> str:
    return "moe" if f"{prefix}router.gate.weight" in part.tensors else "dense"


def _experts(part: PublishedPart, prefix: str) -> dict[str, Any]:
    loop = f"{prefix}experts.0.fc1.linear.weight" in part.tensors
    hidden = part.rows(f"{prefix}experts.0.fc1.linear.weight") if loop else part.shape(f"{prefix}w1")[2]
    bias = "local" if loop or f"{prefix}b1" in part.tensors else "none"
    found = {
        "experts": part.rows(f"{prefix}router.gate.weight"),
        "active": part.says("moe_top_k", 1),
        "hidden": hidden // 2,
        "bias": "global" if f"{prefix}global_bias" in part.tensors else bias,
    }
    return found | _shared_experts(part, prefix)


def _shared_experts(part: PublishedPart, prefix: str) -> dict[str, Any]:
    forms = {
        f"{prefix}shared_w1": f"{prefix}shared_b1",
        f"{prefix}shared_expert.fc1.linear.weight": f"{prefix}shared_expert.fc1.linear.bias",
        f"{prefix}shared_experts.0.fc1.linear.weight": f"{prefix}shared_experts.0.fc1.linear.bias",
    }
    there = next((name for name in forms if name in part.tensors), None)
    if there is None:
        return {"shared_experts": 0, "shared_hidden": 0}
    stack = there.endswith("shared_w1")
    bias = "local" if forms[there] in part.tensors else "none"
    return {
        "shared_experts": part.rows(there) if stack else max(1, _count(part.tensors, f"{prefix}shared_experts.")),
        "shared_hidden": (part.shape(there)[2] if stack else part.rows(there)) // 2,
        "shared_bias": "global" if f"{prefix}shared_experts_bias" in part.tensors else bias,
    }


def _encoder(part: PublishedPart, head_dim: int) -> dict[str, Any]:
    return {
        "attention": _attention(part, "model.layers.0.attention.", head_dim),
        "attention_bias": "model.layers.0.attention.out_proj.bias" in part.tensors,
        "hidden": part.rows("model.layers.0.ff.fc1.linear.weight") // 2,
    }


def _memory(part: PublishedPart, head_dim: int) -> dict[str, Any]:
    variant, inner = "simple", ""
    groups = part.says("num_groups", 1)
    if groups > 1:
        variant, inner = "grouped", "mean"
    elif any(name.startswith("model.interlayer_gate_layers.") for name in part.tensors):
        variant, inner = "self-interlayer", "mean"
    elif "model.mean_stm_norm.weight" in part.tensors:
        variant, inner = "interlayer", "mean"
    elif "model.self_memory_norm_layers.0.weight" in part.tensors:
        variant, inner = "self", "self"
    found: dict[str, Any] = {
        "variant": variant,
        "attention": _attention(part, "model.attention_layers.0.", head_dim),
        "gate": _gate(part),
    }
    if inner:
        exchange = _attention(part, f"model.{inner}_attention_layers.0.", head_dim)
        found["inner_attention"] = None if exchange == found["attention"] else exchange
    if variant == "grouped":
        found["groups"] = groups
    return found


def _gate(part: PublishedPart) -> dict[str, Any]:
    """What no tensor tells has the reference's default where the configuration is silent."""
    prefix = "model.residual_gate_layers.0."
    linear, plain = f"{prefix}gate.weight" in part.tensors, f"{prefix}gate" in part.tensors
    kind = "linear" if linear else part.says("residual_gate_type", "static") if plain else "none"
    size = part.rows(f"{prefix}gate.weight") if linear else part.rows(f"{prefix}gate") if plain else 0
    return {
        "kind": kind,
        "per_slot": size > 1 if kind != "none" else part.says("residual_per_slot_gate", True),
        "activation": "tanh" if part.says("use_tanh_residual_gate", True) else "sigmoid",
        "status": "linear" if f"{prefix}slot_status.weight" in part.tensors else "mean",
        "init": float(part.says("residual_gate_init", 3.0)),
    }
