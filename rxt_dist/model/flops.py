"""Floating-point operations of training, counted by one convention wherever utilisation (MFU) is stated.

Convention: a weight costs 6 operations per token that meets it (2 forward, 4 backward); recomputation is not counted;
padding is no token; routed experts count only where a token visits them; embedding look-ups cost nothing; attention is
counted within each document of a row, because no query looks beyond its own.
"""

from __future__ import annotations

from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.model.count import attention_parameters, count_parameters, embedding_parameters


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
    pairs = sum_sq_document_lengths
    decoder = decoder_flops(model, tokens, pairs, pairs)
    return decoder if model.encoder is None else decoder + encoder_flops(model, tokens, pairs, mlm_targets)


def decoder_flops(model: ModelConfig, tokens: int, pairs: int, memory_pairs: int | None) -> int:
    """Operations of training the decoder, frozen weights counted as the others.

    Args:
        tokens: real tokens; pairs: query-key pairs of full self-attention, of which causality leaves half.
        memory_pairs: pairs of a token and a slot of the memory; None: cross-attention is passed over.
    """
    weights = count_parameters(model)["decoder"].active - embedding_parameters(model)
    if memory_pairs is None:
        cross = attention_parameters(model, model.decoder.cross_attention, model.decoder.attention_bias)
        weights -= model.layers * cross
    causal_width = model.decoder_layers * _width(model, model.decoder.self_attention)
    pair_width = model.layers * _width(model, model.decoder.cross_attention)
    return 6 * weights * tokens + 6 * pairs * causal_width + 12 * (memory_pairs or 0) * pair_width


def encoder_flops(model: ModelConfig, tokens: int, pairs: int, mlm_targets: int) -> int:
    """Operations of training the encoder and its MLM head; arguments as of `training_flops`."""
    assert model.encoder is not None, "a model without encoder"
    counts = count_parameters(model)
    weights = counts["encoder"].active - embedding_parameters(model)
    pair_width = model.layers * _width(model, model.encoder.attention)
    return 6 * weights * tokens + 6 * counts["mlm_head"].active * mlm_targets + 12 * pairs * pair_width


def _width(model: ModelConfig, attention: AttentionConfig) -> int:
    return attention.query_heads * model.head_dim
