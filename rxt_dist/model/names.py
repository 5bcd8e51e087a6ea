"""Names and sizes of all parameters of a network, from its configuration alone: for plans, which load no torch.

They are those of `ReactiveTransformer.named_parameters()`, which tests compare for every published model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from rxt_dist.config.model import AttentionConfig, MemoryAttentionConfig, ModelConfig, MoEConfig, PartName

Sizes = Iterator[tuple[str, int]]


def parameter_sizes(model: ModelConfig, parts: Collection[PartName]) -> dict[str, int]:
    """Elements of each parameter of these parts, by its name in the network."""
    dim, vocabulary = model.dim, model.vocab_size
    found: dict[str, int] = {}
    if "embedding" in parts:
        found["embedding.weight"] = vocabulary * dim
    if "decoder" in parts:
        found |= _under("decoder", _decoder(model))
    if "lm_head" in parts:
        found |= _under("lm_head.output", _linear(dim, vocabulary))
    if "encoder" in parts:
        found |= _under("encoder", _encoder(model))
    if "mlm_head" in parts:
        found |= _under("mlm_head.dense", _linear(dim, dim))
        found |= {"mlm_head.norm.weight": dim, "mlm_head.norm.bias": dim}
        found |= _under("mlm_head.output", _linear(dim, vocabulary))
    if "memory_attention" in parts:
        found |= _under("memory_attention", _memory_attention(model))
    return found


def decoder_layer_kinds(model: ModelConfig) -> list[tuple[bool, bool]]:
    """(stateful, mixture-of-experts) of every decoder layer, in order."""
    before = [(False, kind == "moe") for kind in model.decoder.stateless_before]
    after = [(False, kind == "moe") for kind in model.decoder.stateless_after]
    return [*before, *[(True, True)] * model.layers, *after]


def _under(path: str, sizes: Sizes) -> dict[str, int]:
    return {f"{path}.{name}": size for name, size in sizes}


def _linear(inputs: int, outputs: int, *, bias: bool = True) -> Sizes:
    yield "weight", inputs * outputs
    if bias:
        yield "bias", outputs


def _attention(model: ModelConfig, attention: AttentionConfig, *, bias: bool) -> Sizes:
    width, kv_width = attention.query_heads * model.head_dim, attention.kv_heads * model.head_dim
    yield "q_proj.weight", model.dim * width
    yield "k_proj.weight", model.dim * kv_width
    yield "v_proj.weight", model.dim * kv_width
    if attention.gated:
        yield "gate_proj.weight", model.dim * width
    yield from _under("out_proj", _linear(width, model.dim, bias=bias)).items()


def _dense(dim: int, hidden: int) -> Sizes:
    yield from _under("gate_up_proj", _linear(dim, 2 * hidden)).items()
    yield from _under("down_proj", _linear(hidden, dim)).items()


def _decoder(model: ModelConfig) -> Sizes:
    for index, (stateful, moe) in enumerate(decoder_layer_kinds(model)):
        yield from _under(f"layers.{index}", _decoder_layer(model, stateful=stateful, moe=moe)).items()
    if model.decoder.head_norm != "none":
        yield "head_norm.weight", model.dim
    if model.decoder.head_norm == "layer":
        yield "head_norm.bias", model.dim


def _decoder_layer(model: ModelConfig, *, stateful: bool, moe: bool) -> Sizes:
    decoder, bias = model.decoder, model.decoder.attention_bias
    yield "attention_norm.weight", model.dim
    yield from _under("attention", _attention(model, decoder.self_attention, bias=bias)).items()
    if stateful:
        yield "cross_norm.weight", model.dim
        yield "memory_norm.weight", model.dim
        yield from _under("cross_attention", _attention(model, decoder.cross_attention, bias=bias)).items()
    yield "feed_forward_norm.weight", model.dim
    layer = _moe(model.dim, decoder.moe) if moe else _dense(model.dim, decoder.dense_hidden)
    yield from _under("feed_forward", layer).items()


def _moe(dim: int, moe: MoEConfig) -> Sizes:
    yield "routed.gate.weight", moe.experts * dim
    yield from _experts("routed.experts", moe.experts, dim, moe.hidden, local=moe.bias == "local")
    if moe.shared_experts:
        local = moe.shared_bias == "local"
        yield from _experts("shared", moe.shared_experts, dim, moe.shared_hidden, local=local)
    if moe.shared_experts > 1:
        yield "shared.gate.weight", moe.shared_experts * dim
    if moe.bias == "global":
        yield "global_bias", dim
    if moe.shared_experts and moe.shared_bias == "global":
        yield "shared_bias", dim


def _experts(path: str, count: int, dim: int, hidden: int, *, local: bool) -> Sizes:
    yield f"{path}.gate_up_proj", count * 2 * hidden * dim
    yield f"{path}.down_proj", count * dim * hidden
    if local:
        yield f"{path}.gate_up_bias", count * 2 * hidden
        yield f"{path}.down_bias", count * dim


def _encoder(model: ModelConfig) -> Sizes:
    assert model.encoder is not None
    for index in range(model.layers):
        path = f"layers.{index}"
        yield f"{path}.attention_norm.weight", model.dim
        attention = _attention(model, model.encoder.attention, bias=model.encoder.attention_bias)
        yield from _under(f"{path}.attention", attention).items()
        yield f"{path}.feed_forward_norm.weight", model.dim
        yield from _under(f"{path}.feed_forward", _dense(model.dim, model.encoder.hidden)).items()


def _memory_attention(model: ModelConfig) -> Sizes:
    memory = model.memory_attention
    assert memory is not None
    for index in range(model.layers):
        yield from _under(f"layers.{index}", _write_layer(model, memory)).items()
    if memory.variant in ("interlayer", "self-interlayer", "grouped"):
        yield "across_norm.weight", model.dim


def _write_layer(model: ModelConfig, memory: MemoryAttentionConfig) -> Sizes:
    yield "write_norm.weight", model.dim
    yield "input_norm.weight", model.dim
    yield from _under("write_attention", _attention(model, memory.attention, bias=True)).items()
    gates = ["write_gate"]
    if memory.variant != "simple":
        yield "inner_norm.weight", model.dim
        inner = memory.inner_attention or memory.attention
        yield from _under("inner_attention", _attention(model, inner, bias=True)).items()
        gates.append("inner_gate")
    if memory.variant in ("self-interlayer", "grouped"):
        gates.append("mixing_gate")
    for gate in gates:
        yield from _under(gate, _gate(model, memory)).items()


def _gate(model: ModelConfig, memory: MemoryAttentionConfig) -> Sizes:
    gate, outputs = memory.gate, model.stm_slots if memory.gate.per_slot else 1
    if gate.kind == "linear":
        yield from _under("linear", _linear(model.stm_slots, outputs)).items()
    elif gate.kind != "none":
        yield "weight", outputs
    if gate.status == "linear":
        yield from _under("status", _linear(model.dim, 1)).items()
