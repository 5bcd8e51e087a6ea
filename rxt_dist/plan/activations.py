"""What one micro-batch stores for its backward pass, layer by layer: counted from the source of the layers.

Counted are the tensors that autograd keeps, each once. Widths are in numbers per token; those that are always float32
or int64 are counted in float32 numbers apart from those in the model's type. docs/plan.md has the table.
"""

from __future__ import annotations

from collections.abc import Collection
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


def backward_passes(setting: Setting) -> list[list[Layer]]:
    """The layers of the run's stage, encoder first, as they stand at once: those of all turns of a row. Where a turn is
    computed again those of the last one, and then of the one before, with which the gradients of the first are there.
    """
    turns = setting.config.stage.dialogue()
    if turns.alive == turns.number:
        return [[layer for turn in range(turns.number) for layer in _turn(setting, turn, has_head=turn == 0)]]
    again = [replace(layer, turn=0) for layer in _turn(setting, turns.number - 2)]
    return [[replace(layer, turn=1) for layer in _turn(setting, turns.number - 1)], again]


def _turn(setting: Setting, turn: int, has_head: bool = True) -> list[Layer]:
    """has_head: whether the sum of the gradients of an output head, of which there is one, is counted here."""
    parts = {*setting.config.stage.parts()}
    if turn == 0 and not setting.config.stage.dialogue().first_is_written:
        parts -= {"encoder", "memory_attention"}
    found = [replace(layer, turn=turn) for layer in _layers(setting, parts)]
    gradient = setting.config.model.vocab_size * (setting.config.model.dim + 1) * FLOAT32_BYTES
    heads = ("lm_head", "mlm_head")
    return [
        replace(layer, stored=layer.stored + gradient) if layer.path in heads and has_head else layer for layer in found
    ]


def _layers(setting: Setting, parts: Collection[str]) -> list[Layer]:
    model, tokens = setting.config.model, setting.tokens
    found = [Layer("embedding", 0, 0)]
    if "encoder" in parts and model.encoder is not None and _learns(setting, "embedding", "encoder"):
        width = _own_attention(setting, model.encoder.attention).plus(_dense(setting, model.encoder.hidden))
        found += [_layer(setting, f"encoder.layers.{index}", width) for index in range(model.layers)]
    if "mlm_head" in parts:
        # Masked positions only: input, its product, its gelu, the gradient of the hidden states.
        share = setting.config.stage.masked_share()
        assert share is not None, "a stage with a head for masked tokens says how many it masks"
        masked = round(tokens * share)
        found.append(Layer("mlm_head", 4 * masked * model.dim * setting.element_bytes, 0))
    if "memory_attention" in parts:
        found += [Layer(f"memory_attention.layers.{index}", *write_bytes(setting)) for index in range(model.layers)]
    if "decoder" in parts:
        found.append(Layer("memory", memory_bytes(setting) + _read_bytes(setting), 0))
        for index, (stateful, moe) in enumerate(decoder_layer_kinds(model)):
            width = _own_attention(setting, model.decoder.self_attention)
            if stateful and "encoder" in setting.config.stage.parts():
                width = width.plus(_memory_attention(setting, model.decoder.cross_attention))
            width = width.plus(_experts(setting) if moe else _dense(setting, model.decoder.dense_hidden))
            found.append(_layer(setting, f"decoder.layers.{index}", width))
    if "lm_head" in parts:
        # The head's norm with its input, and the gradient of the hidden states.
        found.append(Layer("lm_head", 2 * tokens * model.dim * setting.element_bytes, 0))
    return found


def _learns(setting: Setting, *parts: str) -> bool:
    """Whether any of these parts trains; else nothing is stored for their backward pass, as there is none."""
    return any(path.split(".")[0] in parts for path in setting.built.by_layer)


def memory_bytes(setting: Setting) -> int:
    """The encoder's outputs, where the decoder gets them without memory attention: with noise they are its memory, and
    as they are they live while it runs."""
    parts = setting.config.stage.parts()
    return encoded_bytes(setting) if {"encoder", "decoder"} <= {*parts} and "memory_attention" not in parts else 0


def _read_bytes(setting: Setting) -> int:
    """The memory that a decoder reads, where it is written by memory attention."""
    written = "memory_attention" in setting.config.stage.parts()
    return memory_tensor_bytes(setting) * setting.element_bytes // FLOAT32_BYTES if written else 0


def turn_bytes(setting: Setting) -> int:
    """What the end of a turn's forward pass takes besides."""
    turns = setting.config.stage.dialogue()
    encoded = encoded_bytes(setting) if turns.noised else 0
    noise = encoded * FLOAT32_BYTES // setting.element_bytes
    return encoded + noise + turns.working * memory_tensor_bytes(setting)


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


def _heads(setting: Setting, attention: AttentionConfig) -> _Width:
    """Queries, keys, values, output, and the gate with its product."""
    width = attention.query_heads * setting.config.model.head_dim
    kept = (4 if attention.gated else 2) * width + _keys_width(setting, attention)
    return _Width(kept, attention.query_heads, 2 * width)


def _keys_width(setting: Setting, attention: AttentionConfig) -> int:
    """Keys and values; the kernel for documents of different lengths wants a key head for every query head."""
    heads = attention.kv_heads if setting.element_bytes == FLOAT32_BYTES else attention.query_heads
    return 2 * heads * setting.config.model.head_dim


def _own_attention(setting: Setting, attention: AttentionConfig) -> _Width:
    """Input and normed input, and the heads."""
    return _Width(2 * setting.config.model.dim, 1, 0).plus(_heads(setting, attention))


def _memory_attention(setting: Setting, attention: AttentionConfig) -> _Width:
    """Input and normed input with queries and what they read; and of each slot its normed memory, key and value. In
    pre-training a token is a slot."""
    slots = setting.micro_rows * setting.config.model.stm_slots
    each = slots / setting.tokens if "memory_attention" in setting.config.stage.parts() else 1.0
    heads, keys = _heads(setting, attention), _keys_width(setting, attention)
    dim = setting.config.model.dim
    return _Width(2 * dim + heads.kept - keys + each * (dim + keys), 1 + heads.float32 + each, heads.inside)


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
