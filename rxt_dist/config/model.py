"""The shape of a Reactive Transformer: decoder, encoder, MLM head and memory attention.

Names and formulas follow docs/model.md. Nothing here knows how the model is trained or on how many ranks.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from rxt_dist.config.base import Config, at_most

# The parts of a Reactive Transformer, as its network names them. Encoder and decoder share the embedding.
PartName = Literal["embedding", "decoder", "lm_head", "encoder", "mlm_head", "memory_attention"]

Width = Annotated[int, at_most(1 << 20)]
Layers = Annotated[int, at_most(1_024)]
Experts = Annotated[int, at_most(65_536)]
FeedForwards = Annotated[tuple[Literal["dense", "moe"], ...], Field(max_length=1_024)]


class AttentionConfig(Config):
    """Sparse query attention (SQA): fewer query heads than `heads`, each of size dim / heads."""

    query_heads: Width = Field(gt=0, description="Query heads Hq; attention runs in width Hq * dim / heads.")
    kv_heads: Width = Field(gt=0, description="Key/value heads Hkv; each serves Hq / Hkv query heads.")
    gated: bool = Field(False, description="Multiply the heads' output by sigmoid(Wg x) before the out-projection.")

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads ({self.query_heads}) must be a multiple of kv_heads ({self.kv_heads})")
        return self


class MoEConfig(Config):
    """Mixture-of-experts feed-forward: every token to `active` of `experts`, and to all shared experts."""

    experts: Experts = Field(gt=0, description="Routed experts E.")
    active: Experts = Field(gt=0, description="Routed experts per token K.")
    hidden: Width = Field(gt=0, description="Hidden width h of one routed expert.")
    bias: Literal["global", "local", "none"] = Field(
        "global", description="Routed bias: one vector after the combination, two per expert, or none."
    )
    shared_experts: Experts = Field(0, ge=0, description="Experts that see every token; two or more are softmax-gated.")
    shared_hidden: Width = Field(0, ge=0, description="Hidden width of one shared expert.")
    shared_bias: Literal["global", "local", "none"] = Field("global", description="Bias mode of the shared experts.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.active > self.experts:
            raise ValueError(f"active ({self.active}) must not exceed experts ({self.experts})")
        if bool(self.shared_experts) != bool(self.shared_hidden):
            raise ValueError(
                f"shared_experts ({self.shared_experts}) and shared_hidden ({self.shared_hidden}) go together: "
                "both zero or both positive"
            )
        return self


class DecoderConfig(Config):
    """The generating decoder: stateless layers, stateful layers that read the memory, stateless layers."""

    stateless_before: FeedForwards = Field(
        (), description="Feed-forward kinds of the layers before the stateful ones; they have no memory access."
    )
    stateless_after: FeedForwards = Field((), description="The same, after the stateful layers.")
    self_attention: AttentionConfig = Field(description="Causal self-attention.")
    cross_attention: AttentionConfig = Field(description="Memory cross-attention of the stateful layers; never gated.")
    attention_bias: bool = Field(False, description="Bias of the attention out-projections.")
    dense_hidden: Width = Field(0, ge=0, description="Hidden width of dense layers (needed where one is 'dense').")
    moe: MoEConfig = Field(description="Feed-forward of all other layers.")
    head_norm: Literal["rms", "layer", "none"] = Field("rms", description="Norm before the language-model head.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.cross_attention.gated:
            raise ValueError("cross_attention.gated must be false: the architecture gates self-attention only")
        if "dense" in self.stateless_before + self.stateless_after and not self.dense_hidden:
            raise ValueError("a layer is 'dense' but dense_hidden is 0; set its hidden width")
        return self


class EncoderConfig(Config):
    """The bidirectional encoder; it has as many layers as the decoder has stateful ones."""

    attention: AttentionConfig = Field(description="Bidirectional self-attention.")
    attention_bias: bool = Field(False, description="Bias of the attention out-projections.")
    hidden: Width = Field(gt=0, description="Hidden width of the dense feed-forward.")


class ResidualGateConfig(Config):
    """How old and new memory are weighed against each other (docs/model.md, residual gates)."""

    kind: Literal["elementwise", "linear", "static", "none"] = Field(
        "elementwise", description="What the gate is computed from; 'none' adds old and new."
    )
    per_slot: bool = Field(True, description="One gate per memory slot instead of one per layer.")
    activation: Literal["sigmoid", "tanh"] = Field("sigmoid", description="g*new+(1-g)*old, or (1+g)*new+(1-g)*old.")
    status: Literal["mean", "linear"] = Field("mean", description="A slot's status: its mean, or a learnt projection.")
    init: float = Field(3.0, description="Initial gate weight.")


class MemoryAttentionConfig(Config):
    """The network that writes an interaction into the memory, one independent layer per memory layer."""

    variant: Literal["simple", "self", "interlayer", "self-interlayer", "grouped"] = Field(
        description="What a layer's slots exchange before they read the interaction."
    )
    attention: AttentionConfig = Field(description="Attention of slots over the encoded interaction.")
    inner_attention: AttentionConfig | None = Field(
        None, description="Attention between slots (self / interlayer); default: as `attention`."
    )
    groups: PositiveInt = Field(1, description="Groups of consecutive layers for variant 'grouped'.")
    gate: ResidualGateConfig = Field(ResidualGateConfig(), description="Residual gates of every step.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.attention.gated or (self.inner_attention and self.inner_attention.gated):
            raise ValueError("memory attention has no attention gates; set gated to false")
        if self.variant != "grouped" and self.groups != 1:
            raise ValueError(f"groups ({self.groups}) belongs to variant 'grouped', not '{self.variant}'")
        return self


class ModelConfig(Config):
    """A whole Reactive Transformer. `encoder` and `memory_attention` may be absent (decoder-only models)."""

    name: str = Field(description="Name of the system, for reports.")
    dim: Width = Field(gt=0, description="Width D of the residual stream.")
    layers: Layers = Field(gt=0, description="Stateful layers L of the decoder; also layers of encoder and memory.")
    heads: Width = Field(gt=0, description="Heads H for the split: head size is dim / heads.")
    vocab_size: PositiveInt = Field(le=65536, description="Vocabulary V.")
    seq_len: Width = Field(gt=0, description="Longest interaction or training row, in tokens.")
    stm_slots: Width = Field(gt=0, description="Memory slots S per layer.")
    rope_base: PositiveFloat = Field(10000.0, description="Base of the rotary position angles.")
    rope_angles: Literal["float32", "bfloat16"] = Field(
        "float32", description="Precision of the rotary angles; bfloat16 only for weights that were trained so."
    )
    norm_eps: float | None = Field(1e-6, gt=0, description="RMSNorm epsilon; null: machine epsilon of the data type.")
    decoder: DecoderConfig
    encoder: EncoderConfig | None = None
    memory_attention: MemoryAttentionConfig | None = None

    @property
    def head_dim(self) -> int:
        """Size d of one attention head."""
        return self.dim // self.heads

    @property
    def decoder_layers(self) -> int:
        """All decoder layers, stateless and stateful."""
        return len(self.decoder.stateless_before) + self.layers + len(self.decoder.stateless_after)

    @property
    def moe_layers(self) -> int:
        """Decoder layers with routed experts."""
        dense = (self.decoder.stateless_before + self.decoder.stateless_after).count("dense")
        return self.decoder_layers - dense

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim ({self.dim}) must be a multiple of heads ({self.heads})")
        if self.head_dim % 2:
            raise ValueError(f"head size dim / heads ({self.head_dim}) must be even for rotary positions")
        memory = self.memory_attention
        if memory and self.layers % memory.groups:
            raise ValueError(f"layers ({self.layers}) must be a multiple of memory_attention.groups ({memory.groups})")
        if memory and not self.encoder:
            raise ValueError("memory_attention needs an encoder to read interactions with; add one or drop it")
        for where, attention in self._attentions():
            if attention.query_heads > self.heads:
                raise ValueError(f"{where}.query_heads ({attention.query_heads}) must not exceed heads ({self.heads})")
        return self

    def _attentions(self) -> list[tuple[str, AttentionConfig]]:
        found = [
            ("decoder.self_attention", self.decoder.self_attention),
            ("decoder.cross_attention", self.decoder.cross_attention),
        ]
        if self.encoder:
            found.append(("encoder.attention", self.encoder.attention))
        if self.memory_attention:
            found.append(("memory_attention.attention", self.memory_attention.attention))
        return found
