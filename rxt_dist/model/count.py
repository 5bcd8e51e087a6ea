"""Parameter counts of a Reactive Transformer, computed from its configuration without torch.

Notation of docs/model.md: D width, V vocabulary, S memory slots, d = D / H head size, w = Hq * d the width of sparse
query attention, kv = Hkv * d. A figure counts weights and biases; the token embedding (V * D) is contained in both the
decoder's and the encoder's figure, because either can be used alone, and is counted once in the system's.
"""

from __future__ import annotations

from dataclasses import dataclass

from rxt_dist.config.model import (
    AttentionConfig,
    EncoderConfig,
    MemoryAttentionConfig,
    ModelConfig,
    MoEConfig,
    ResidualGateConfig,
)

PARTS = ("decoder", "encoder", "mlm_head", "memory_attention")


@dataclass(frozen=True)
class Count:
    """Parameters of one part: all of them, and those that take part in the computation of one token."""

    total: int
    active: int


def count_parameters(model: ModelConfig) -> dict[str, Count]:
    """Counts of `PARTS`, in that order; a part that the model does not have counts 0."""
    decoder = decoder_parameters(model)
    encoder = encoder_parameters(model)
    head = mlm_head_parameters(model)
    memory = memory_attention_parameters(model)
    return {
        "decoder": Count(decoder, decoder - inactive_parameters(model)),
        "encoder": Count(encoder, encoder),
        "mlm_head": Count(head, head),
        "memory_attention": Count(memory, memory),
    }


def count_system(model: ModelConfig) -> Count:
    """Decoder, encoder and memory attention with their shared embedding counted once.

    The MLM head is not in it: it exists in pre-training only.
    """
    counts = count_parameters(model)
    parts = [counts["decoder"], counts["encoder"], counts["memory_attention"]]
    shared = embedding_parameters(model) if model.encoder else 0
    return Count(sum(part.total for part in parts) - shared, sum(part.active for part in parts) - shared)


def embedding_parameters(model: ModelConfig) -> int:
    """V * D."""
    return model.vocab_size * model.dim


def attention_parameters(model: ModelConfig, attention: AttentionConfig, bias: bool) -> int:
    """q and out D * w each, k and v D * kv each, a gate D * w where gated, an out-projection bias D where `bias`."""
    width = attention.query_heads * model.head_dim
    kv_width = attention.kv_heads * model.head_dim
    projections = (3 if attention.gated else 2) * model.dim * width + 2 * model.dim * kv_width
    return projections + (model.dim if bias else 0)


def dense_parameters(dim: int, hidden: int) -> int:
    """W1 D * 2h with bias 2h, W2 h * D with bias D."""
    return 3 * dim * hidden + 2 * hidden + dim


def expert_parameters(model: ModelConfig) -> int:
    """One routed expert: 3 * D * h, and with local biases 2h + D more."""
    moe = model.decoder.moe
    return dense_parameters(model.dim, moe.hidden) if moe.bias == "local" else 3 * model.dim * moe.hidden


def routed_parameters(model: ModelConfig) -> int:
    """All routed experts of all MoE layers: what expert parallelism spreads over ranks."""
    return model.moe_layers * model.decoder.moe.experts * expert_parameters(model)


def inactive_parameters(model: ModelConfig) -> int:
    """The E - K routed experts per MoE layer that one token does not visit."""
    moe = model.decoder.moe
    return model.moe_layers * (moe.experts - moe.active) * expert_parameters(model)


def moe_parameters(model: ModelConfig) -> int:
    """Router E * D, E experts, a global bias D; shared experts with their softmax gate (Ns * D when Ns > 1)."""
    moe, dim = model.decoder.moe, model.dim
    routed = moe.experts * (dim + expert_parameters(model)) + (dim if moe.bias == "global" else 0)
    return routed + _shared_parameters(moe, dim)


def local_moe_parameters(model: ModelConfig, expert_parallel: int) -> int:
    """What a rank has of one MoE layer when its experts are split over so many ranks."""
    elsewhere = model.decoder.moe.experts - model.decoder.moe.experts // expert_parallel
    return moe_parameters(model) - elsewhere * expert_parameters(model)


def _shared_parameters(moe: MoEConfig, dim: int) -> int:
    if not moe.shared_experts:
        return 0
    local = moe.shared_bias == "local"
    expert = dense_parameters(dim, moe.shared_hidden) if local else 3 * dim * moe.shared_hidden
    gate = moe.shared_experts * dim if moe.shared_experts > 1 else 0
    return moe.shared_experts * expert + gate + (dim if moe.shared_bias == "global" else 0)


def decoder_parameters(model: ModelConfig) -> int:
    """Embedding, layers, head norm, and the untied head V * D + V.

    A stateless layer has self-attention, a feed-forward and two norms; a stateful one also memory cross-attention with
    two more norms (of its input and of the memory).
    """
    decoder, dim = model.decoder, model.dim
    attention = attention_parameters(model, decoder.self_attention, decoder.attention_bias)
    cross = attention_parameters(model, decoder.cross_attention, decoder.attention_bias)
    moe = moe_parameters(model)
    stateful = attention + cross + moe + 4 * dim
    stateless = {
        "moe": attention + moe + 2 * dim,
        "dense": attention + dense_parameters(dim, decoder.dense_hidden) + 2 * dim,
    }
    layers = model.layers * stateful + sum(
        stateless[kind] for kind in decoder.stateless_before + decoder.stateless_after
    )
    head_norm = {"rms": dim, "layer": 2 * dim, "none": 0}[decoder.head_norm]
    head = dim * model.vocab_size + model.vocab_size
    return embedding_parameters(model) + layers + head_norm + head


def encoder_parameters(model: ModelConfig) -> int:
    """Embedding and L layers of attention, dense feed-forward and two norms; no final norm."""
    if model.encoder is None:
        return 0
    return embedding_parameters(model) + model.layers * _encoder_layer(model, model.encoder)


def _encoder_layer(model: ModelConfig, encoder: EncoderConfig) -> int:
    attention = attention_parameters(model, encoder.attention, encoder.attention_bias)
    return attention + dense_parameters(model.dim, encoder.hidden) + 2 * model.dim


def mlm_head_parameters(model: ModelConfig) -> int:
    """Linear(D, D), LayerNorm(D), Linear(D, V), all with biases."""
    if model.encoder is None:
        return 0
    dim, vocabulary = model.dim, model.vocab_size
    return (dim * dim + dim) + 2 * dim + (dim * vocabulary + vocabulary)


def memory_attention_parameters(model: ModelConfig) -> int:
    """L layers of attentions, norms and residual gates; attention out-projections always have a bias.

    Per layer: `simple` has one attention (over the interaction), one gate, and norms of the memory and of the
    interaction; every other variant has a second attention (between slots), a norm for it and a gate after it; the
    self-interlayer variants a third gate, which mixes a layer's own slots with the mean. Variants that use the mean
    over layers have one norm of the mean, shared by all layers.
    """
    memory = model.memory_attention
    if memory is None:
        return 0
    inner = memory.inner_attention or memory.attention
    attention = attention_parameters(model, memory.attention, bias=True)
    attention += 0 if memory.variant == "simple" else attention_parameters(model, inner, bias=True)
    norms = (2 if memory.variant == "simple" else 3) * model.dim
    gates = _gates_per_layer(memory) * residual_gate_parameters(memory.gate, model.stm_slots, model.dim)
    mean_norm = 0 if memory.variant in ("simple", "self") else model.dim
    return model.layers * (attention + norms + gates) + mean_norm


def _gates_per_layer(memory: MemoryAttentionConfig) -> int:
    return {"simple": 1, "self": 2, "interlayer": 2, "self-interlayer": 3, "grouped": 3}[memory.variant]


def residual_gate_parameters(gate: ResidualGateConfig, slots: int, dim: int) -> int:
    """A weight per slot (or one), for `linear` a Linear(S, S) (or Linear(S, 1)); a learnt status adds Linear(D, 1)."""
    if gate.kind == "none":
        return 0
    outputs = slots if gate.per_slot else 1
    weight = outputs * slots + outputs if gate.kind == "linear" else outputs
    return weight + (dim + 1 if gate.status == "linear" else 0)
