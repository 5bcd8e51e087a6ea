"""The folders that a system becomes in the reference implementation's format, and the configuration of each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.data.interactions import ANSWER_ID, CALL_ID, INTERNAL_ID, QUERY_ID, RESULT_ID, THINK_ID
from rxt_dist.data.rows import BOS_ID, EOS_ID, PAD_ID
from rxt_dist.model.reference_names import Entries, Part, expert_form, exported

_BIASES = {"global": "global", "local": "local", "none": "off"}
_NORMS = {"rms": "rms_norm", "layer": "layer_norm", "none": "rms_norm"}
# Variants of which the reference builds a whole system; one with `interlayer` it builds as self-interlayer.
_WHOLE = {"self-interlayer": "self-interlayer", "grouped": "grouped-self-interlayer"}
_NEEDS: dict[Part, tuple[str, ...]] = {
    "decoder": ("embedding", "decoder", "lm_head"),
    "encoder": ("embedding", "encoder"),
    "memory_attention": ("memory_attention",),
    "mlm_head": ("mlm_head",),
}
_CLASSES = {
    "simple": "RxTSimpleMemoryAttention",
    "self": "RxTSelfMemoryAttention",
    "interlayer": "RxTInterlayerMemoryAttention",
    "self-interlayer": "RxTSelfInterlayerMemoryAttention",
    "grouped": "RxTGroupedSelfInterlayerMemoryAttention",
}


@dataclass(frozen=True)
class Folder:
    """One folder that the reference loads by itself.

    path: below the export; empty for the export itself. loads: the class that loads it. tensors: names in it, each
    with its place among our parameters.
    """

    path: str
    loads: str
    config: dict[str, Any]
    tensors: Entries


def reference_folders(config: ModelConfig, parameters: Collection[str]) -> list[Folder]:
    """The folders for all parts of which our parameters are there: one for the whole system where the reference can
    build it, and the MLM head, which no system has; else one for each part."""
    form = expert_form(config)
    built = {name.split(".")[0] for name in parameters}
    parts = [part for part, needs in _NEEDS.items() if built.issuperset(needs)]
    tensors = {part: exported(config, part, parameters, form) for part in parts}
    systems = [part for part in parts if part != "mlm_head"]
    memory = config.memory_attention
    folders = [Folder(part, _class(config, part), part_arguments(config, part), tensors[part]) for part in parts]
    if len(systems) < 3 or memory is None or memory.variant not in _WHOLE:
        return folders
    joined = {f"{part}.{name}": entry for part in systems for name, entry in tensors[part].items()}
    return [
        Folder("", "RxTBeta", _system(config), joined),
        *[folder for folder in folders if folder.path == "mlm_head"],
    ]


def _class(config: ModelConfig, part: Part) -> str:
    if part == "memory_attention":
        assert config.memory_attention is not None
        return _CLASSES[config.memory_attention.variant]
    return {"decoder": "RxTDecoder", "encoder": "RxTEncoder", "mlm_head": "MLMHead"}[part]


def _system(config: ModelConfig) -> dict[str, Any]:
    assert config.memory_attention is not None
    ids = {
        "bos": BOS_ID,
        "eos": EOS_ID,
        "query": QUERY_ID,
        "answer": ANSWER_ID,
        "pad": PAD_ID,
        "think": THINK_ID,
        "tool_call": CALL_ID,
        "tool_use": RESULT_ID,
        "internal": INTERNAL_ID,
    }
    return {
        "decoder_config": part_arguments(config, "decoder"),
        "encoder_config": part_arguments(config, "encoder"),
        "memory_attention_config": part_arguments(config, "memory_attention"),
        "tokenizer_config": {f"{name}_token_id": number for name, number in ids.items()},
        "memory_attention_variant": _WHOLE[config.memory_attention.variant],
    }


def part_arguments(config: ModelConfig, part: Part) -> dict[str, Any]:
    """The flat constructor arguments of a part."""
    if part == "mlm_head":
        return {"embed_dim": config.dim, "vocab_size": config.vocab_size}
    common: dict[str, Any] = {
        "num_layers": config.layers,
        "embed_dim": config.dim,
        "att_heads": config.heads,
        "seq_len": config.seq_len,
        "stm_size": config.stm_slots,
        "rope_base": int(config.rope_base) if config.rope_base == int(config.rope_base) else config.rope_base,
        "use_flash_attention": False,
    }
    if part == "memory_attention":
        return common | _memory(config)
    common |= {"vocab_size": config.vocab_size, "use_gated": True, "ff_activation": "silu", "ff_dropout": 0.0}
    common |= {"self_att_type": "sqa", "cross_att_type": "sqa"}
    return common | (_decoder(config) if part == "decoder" else _encoder(config))


def _heads(attention: AttentionConfig, prefix: str = "att") -> dict[str, int]:
    return {f"{prefix}_query_groups": attention.query_heads, f"{prefix}_groups": attention.kv_heads}


def _decoder(config: ModelConfig) -> dict[str, Any]:
    decoder, moe = config.decoder, config.decoder.moe
    return {
        **_heads(decoder.self_attention),
        **_heads(decoder.cross_attention, "cross_att"),
        "use_attention_output_bias": decoder.attention_bias,
        "use_gated_attention": decoder.self_attention.gated,
        "use_gated_cross_attention": False,
        "use_moe": True,
        "ff_dim": moe.hidden,
        "num_experts": moe.experts,
        "moe_top_k": moe.active,
        "moe_bias_mode": _BIASES[moe.bias],
        "num_shared_experts": moe.shared_experts,
        "shared_expert_dim": moe.shared_hidden or moe.hidden,
        "moe_shared_experts_bias_mode": _BIASES[moe.shared_bias],
        "moe_use_weighted_shared_experts": False,
        "use_vectorized_moe": expert_form(config) == "stacked",
        "moe_grouped_gemm": False,
        "moe_use_cutlass_grouped_gemm": False,
        "router_amp": False,
        "router_dtype": "float32",
        "dense_layer_dim": decoder.dense_hidden,
        "stateless_layers_config": list(decoder.stateless_before),
        "final_stateless_layers_config": list(decoder.stateless_after),
        "use_head_norm": decoder.head_norm != "none",
        "head_norm_type": _NORMS[decoder.head_norm],
    }


def _encoder(config: ModelConfig) -> dict[str, Any]:
    encoder = config.encoder
    assert encoder is not None
    return {
        **_heads(encoder.attention),
        "use_attention_output_bias": encoder.attention_bias,
        "use_gated_attention": encoder.attention.gated,
        "ff_dim": encoder.hidden,
        "skip_memory_cross_attention": True,
    }


def _memory(config: ModelConfig) -> dict[str, Any]:
    memory = config.memory_attention
    assert memory is not None
    inner, gate = memory.inner_attention or memory.attention, memory.gate
    arguments: dict[str, Any] = {
        **_heads(memory.attention),
        "att_type": "sqa",
        "norm_type": "classic-rms",
        "use_gated_residual": gate.kind != "none",
        "residual_per_slot_gate": gate.per_slot,
        "residual_gate_type": "elementwise" if gate.kind == "none" else gate.kind,
        "residual_gate_slot_status_type": gate.status,
        "residual_gate_init": gate.init,
        "use_tanh_residual_gate": gate.activation == "tanh",
    }
    if memory.variant != "simple":
        prefix = "self" if memory.variant == "self" else "interlayer"
        arguments |= _heads(inner, f"{prefix}_att") | {f"{prefix}_att_type": "sqa"}
    if memory.variant == "self":
        arguments["use_gate_for_self_attention"] = True
    if memory.variant == "grouped":
        arguments["num_groups"] = memory.groups
    return arguments
