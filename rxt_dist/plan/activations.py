"""What one micro-batch stores for its backward pass, layer by layer: counted from the source of the layers.

Counted are the tensors that autograd keeps, each once. Widths are in numbers per token; those that are always float32
or int64 are counted in float32 numbers apart from those in the model's type. docs/plan.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.model.names import decoder_layer_kinds
from rxt_dist.plan.setting import FLOAT32_BYTES, Setting
from rxt_dist.plan.writes import encoded_bytes, memory_tensor_bytes, write_bytes

# Rows of logits that exist at once on CPU (rxt_dist/model/cross_entropy.py).
_CPU_LOGIT_ROWS = 256


@dataclass(frozen=True)
class Layer:
    """A layer, or a part of the network outside of layers, in the order of the forward pass.

    path: of its parameters. stored: bytes from its forward to its backward pass. inside: bytes that its backward pass
    takes besides, with recomputation what it stores again. turn: of the row, from 0 on; its gradients begin in the
    backward pass of the last turn, and are complete after that of the first.
    """

    path: str
    stored: int
    inside: int
    turn: int = 0


def layers(setting: Setting) -> list[Layer]:
    """All layers of the run's stage, encoder first, as often as a row has turns that stand at once."""
    turns = setting.config.stage.dialogue()
    return [replace(layer, turn=turn) for turn in range(turns.alive) for layer in _turn(setting)]


def _turn(setting: Setting) -> list[Layer]:
    model, parts, tokens = setting.config.model, setting.config.stage.parts(), setting.tokens
    found = [Layer("embedding", 0, 0)]
    if "encoder" in parts and model.encoder is not None and _learns(setting, "embedding", "encoder"):
        width = _own_attention(setting, model.encoder.attention).plus(_dense(setting, model.encoder.hidden))
        found += [_layer(setting, f"encoder.layers.{index}", width) for index in range(model.layers)]
    if "mlm_head" in parts:
        # Masked positions only: input, its product, its gelu, the gradient of the hidden states.
        masked = round(tokens * getattr(setting.config.stage, "mlm_probability", 1.0))
        found.append(_head(setting, "mlm_head", 4 * masked * model.dim))
    if "memory_attention" in parts:
        found += [Layer(f"memory_attention.layers.{index}", *write_bytes(setting)) for index in range(model.layers)]
    if "decoder" in parts:
        found.append(Layer("memory", memory_bytes(setting), 0))
        for index, (stateful, moe) in enumerate(decoder_layer_kinds(model)):
            width = _own_attention(setting, model.decoder.self_attention)
            if stateful and "encoder" in parts:
                width = width.plus(_memory_attention(setting, model.decoder.cross_attention))
            width = width.plus(_experts(setting) if moe else _dense(setting, model.decoder.dense_hidden))
            found.append(_layer(setting, f"decoder.layers.{index}", width))
    if "lm_head" in parts:
        # The head's norm with its input, and the gradient of the hidden states.
        found.append(_head(setting, "lm_head", 2 * tokens * model.dim))
    return found


def _learns(setting: Setting, *parts: str) -> bool:
    """Whether any of these parts trains; else nothing is stored for their backward pass, as there is none."""
    return any(path.split(".")[0] in parts for path in setting.built.by_layer)


def memory_bytes(setting: Setting) -> int:
    """The encoder's outputs, which joint training gives to the decoder: with noise they are its memory, and as they are
    they live while it runs."""
    parts = setting.config.stage.parts()
    return encoded_bytes(setting) if {"encoder", "decoder"} <= {*parts} and "memory_attention" not in parts else 0


def turn_bytes(setting: Setting) -> int:
    """What the end of a turn's forward pass takes besides: where it is written, its encoding and noise as they are."""
    if "memory_attention" not in setting.config.stage.parts():
        return 0
    encoded = encoded_bytes(setting)
    noise = encoded * FLOAT32_BYTES // setting.element_bytes
    return encoded + noise + setting.config.stage.dialogue().working * memory_tensor_bytes(setting)


def kept_memories_bytes(setting: Setting) -> int:
    """What a stage keeps of every turn of a row beside what layers store."""
    turns = setting.config.stage.dialogue()
    return turns.number * turns.memories * memory_tensor_bytes(setting)


def logit_bytes(setting: Setting) -> int:
    """Logits of one chunk of positions, in the model's type and in float32."""
    train = setting.config.train
    if not {"lm_head", "mlm_head"} & {*setting.config.stage.parts()}:
        return 0
    rows = min(train.logit_chunk_tokens, setting.tokens, *([_CPU_LOGIT_ROWS] if setting.on_cpu else []))
    apart = setting.element_bytes if setting.element_bytes != FLOAT32_BYTES else 0
    return rows * setting.config.model.vocab_size * (apart + FLOAT32_BYTES)


@dataclass(frozen=True)
class _Width:
    """Numbers per token: kept ones in the model's type and in float32, and those of the backward pass alone."""

    kept: float
    float32: float
    inside: float

    def plus(self, other: _Width) -> _Width:
        return _Width(self.kept + other.kept, self.float32 + other.float32, max(self.inside, other.inside))


def _layer(setting: Setting, path: str, width: _Width) -> Layer:
    tokens, element = setting.tokens, setting.element_bytes
    stored = round(tokens * (width.kept * element + width.float32 * FLOAT32_BYTES))
    inside = round(tokens * width.inside * element)
    if setting.recompute:
        return Layer(path, tokens * setting.config.model.dim * element, stored + inside)
    return Layer(path, stored, inside)


def _head(setting: Setting, path: str, numbers: int) -> Layer:
    """An output head; the sum of its weight's gradient is kept in float32 from the forward pass on."""
    model = setting.config.model
    gradient = model.vocab_size * (model.dim + 1) * FLOAT32_BYTES
    return Layer(path, numbers * setting.element_bytes + gradient, 0)


def _heads(setting: Setting, attention: AttentionConfig) -> _Width:
    """Queries, keys, values, output, and the gate with its product."""
    model = setting.config.model
    width, kv_width = attention.query_heads * model.head_dim, attention.kv_heads * model.head_dim
    if setting.element_bytes != FLOAT32_BYTES:
        # The kernel for documents of different lengths wants a key head for every query head.
        kv_width = width
    return _Width((4 if attention.gated else 2) * width + 2 * kv_width, attention.query_heads, 2 * width)


def _own_attention(setting: Setting, attention: AttentionConfig) -> _Width:
    """Input and normed input, and the heads."""
    return _Width(2 * setting.config.model.dim, 1, 0).plus(_heads(setting, attention))


def _memory_attention(setting: Setting, attention: AttentionConfig) -> _Width:
    """The same, and the normed memory."""
    return _Width(3 * setting.config.model.dim, 2, 0).plus(_heads(setting, attention))


def _dense(setting: Setting, hidden: int) -> _Width:
    """Input and normed input; gate and up halves, their product, uncompiled also the gate's SiLU."""
    halves = (3 if setting.fused else 4) * hidden
    return _Width(2 * setting.config.model.dim + halves, 1, 3 * hidden + 2 * setting.config.model.dim)


def _experts(setting: Setting) -> _Width:
    """Input and normed input, routed and shared experts."""
    return _Width(2 * setting.config.model.dim, 1, 0).plus(_routed(setting)).plus(_shared(setting.config.model))


def _routed(setting: Setting) -> _Width:
    """Probabilities and logits of all experts, the choice; of K visits the gate and up halves.

    A GPU keeps the gathered rows and the weighted product too; where experts are split, rows as they come and as they
    are sorted.
    """
    model = setting.config.model
    moe = model.decoder.moe
    choice = 2 * moe.experts + 10 * moe.active
    if setting.expert_parallel > 1:
        return _Width(moe.active * (2 * model.dim + 3 * moe.hidden), choice, moe.active * (2 * model.dim + moe.hidden))
    if setting.on_cpu:
        return _Width(2 * moe.active * moe.hidden, choice, moe.active * model.dim + 2 * model.dim)
    return _Width(moe.active * (model.dim + 3 * moe.hidden), choice, moe.active * (model.dim + 2 * moe.hidden))


def _shared(model: ModelConfig) -> _Width:
    moe = model.decoder.moe
    return _Width(5 * moe.shared_experts * moe.shared_hidden, moe.shared_experts, 0)
