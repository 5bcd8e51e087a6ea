"""Floating-point operations of training, counted by one convention wherever utilisation (MFU) is stated.

Convention: a weight costs 6 operations per token that meets it (2 forward, 4 backward); recomputation is not counted;
padding is no token; routed experts count only where a token visits them; embedding look-ups cost nothing; attention is
counted within each document of a row, because no query looks beyond its own.
"""

from __future__ import annotations

from collections.abc import Collection

from rxt_dist.config.model import AttentionConfig, ModelConfig, PartName
from rxt_dist.model.names import parameter_sizes

# What operations are told apart by, in the order in which they are computed.
COMPUTED = ("encoder", "mlm_head", "self_attention", "cross_attention", "feed_forward", "lm_head")


def flops_by_part(
    model: ModelConfig,
    tokens: int,
    sum_sq_document_lengths: int,
    mlm_targets: int,
    parts: Collection[PartName],
    memory_pairs: int | None = None,
) -> dict[str, int]:
    """Operations of training these parts of a network on some rows, forward and backward, by `COMPUTED`.

    With N the active parameters of a part without the embedding, P the sum of the squared document lengths (the number
    of query-key pairs of full attention) and w the width of a layer's attention (query heads times head size; scores
    and their product with the values cost 2 w each per pair, three times with the backward pass):

        6 * N * tokens, of the MLM head 6 * N * mlm_targets
        + 12 * P * (encoder layers * w_encoder + stateful layers * w_cross + decoder layers * w_self / 2)

    The half is causality, which only the decoder's self-attention has: a query of the memory cross-attention sees all
    memory positions of its document.

    Args:
        tokens: real tokens, padding excluded.
        sum_sq_document_lengths: sum of len^2 over the documents of the rows, each as long as its piece in the row.
        mlm_targets: masked positions, the only ones that the MLM head computes.
        memory_pairs: pairs of a token and a memory slot; None: the memory is the row itself, with as many as above.
    """
    moe, found = model.decoder.moe, dict.fromkeys(COMPUTED, 0)
    for name, size in parameter_sizes(model, parts).items():
        part = _computed_in(name)
        if part is not None:
            active = size * moe.active // moe.experts if ".routed.experts." in name else size
            found[part] += 6 * active * (mlm_targets if part == "mlm_head" else tokens)
    if "encoder" in parts and model.encoder is not None:
        found["encoder"] += 12 * sum_sq_document_lengths * model.layers * _width(model, model.encoder.attention)
    if "decoder" in parts:
        cross, own = _width(model, model.decoder.cross_attention), _width(model, model.decoder.self_attention)
        read = sum_sq_document_lengths if memory_pairs is None else memory_pairs
        found["cross_attention"] += 12 * read * model.layers * cross
        found["self_attention"] += 6 * sum_sq_document_lengths * model.decoder_layers * own
    return found


def _computed_in(parameter: str) -> str | None:
    """The part of `COMPUTED` that a parameter belongs to; None where it only looks up or has no convention."""
    part, _, inner = parameter.partition(".")
    if part in ("encoder", "mlm_head", "lm_head"):
        return part
    if part != "decoder":
        return None
    field = inner.split(".")[2] if inner.startswith("layers.") else ""
    if field in ("cross_norm", "memory_norm", "cross_attention"):
        return "cross_attention"
    return "feed_forward" if field.startswith("feed_forward") else "self_attention"


def _width(model: ModelConfig, attention: AttentionConfig) -> int:
    return attention.query_heads * model.head_dim
