"""Floating-point operations of training, counted by one convention wherever utilisation (MFU) is stated.

Convention: a weight costs 6 operations per token that meets it (2 forward, 4 backward); recomputation is not counted;
padding is no token; routed experts count only where a token visits them; embedding look-ups cost nothing; attention is
counted within each document of a row, because no query looks beyond its own.
"""

from __future__ import annotations

from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.model.count import count_parameters, embedding_parameters


def training_flops(model: ModelConfig, tokens: int, sum_sq_document_lengths: int, mlm_targets: int) -> int:
    """Operations of training decoder and encoder on some rows, forward and backward.

    With N the active parameters of decoder and encoder without their embeddings, P the sum of the squared document
    lengths (the number of query-key pairs of full attention) and w the width of a layer's attention (query heads times
    head size; scores and their product with the values cost 2 w each per pair, three times with the backward pass):

        6 * N * tokens + 6 * (parameters of the MLM head) * mlm_targets
        + 12 * P * (encoder layers * w_encoder + stateful layers * w_cross + decoder layers * w_self / 2)

    The half is causality, which only the decoder's self-attention has: a query of the memory cross-attention sees all
    memory positions of its document.

    Args:
        model: the model; one without encoder has only the decoder's terms.
        tokens: real tokens, padding excluded.
        sum_sq_document_lengths: sum of len^2 over the documents of the rows, each as long as its piece in the row.
        mlm_targets: masked positions, the only ones that the MLM head computes.
    """
    counts = count_parameters(model)
    embedding = embedding_parameters(model)
    weights = counts["decoder"].active - embedding
    pair_width = model.layers * _width(model, model.decoder.cross_attention)
    if model.encoder is not None:
        weights += counts["encoder"].active - embedding
        pair_width += model.layers * _width(model, model.encoder.attention)
    causal_width = model.decoder_layers * _width(model, model.decoder.self_attention)
    matrices = 6 * weights * tokens + 6 * counts["mlm_head"].active * mlm_targets
    return matrices + 6 * sum_sq_document_lengths * (2 * pair_width + causal_width)


def _width(model: ModelConfig, attention: AttentionConfig) -> int:
    return attention.query_heads * model.head_dim
