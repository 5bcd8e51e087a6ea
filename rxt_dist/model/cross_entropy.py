"""Cross-entropy of a linear classifier, in chunks, without ever holding all logits.

At 65,536 words and 8,192 tokens the float32 logits alone are 2.1 GB, and as much again for their gradient. Here a
chunk's logits live only while the chunk is computed: its gradient is formed at once (the loss is a sum, so the
gradient only waits for one scalar factor) and reduced to the gradients of hidden states, weight and bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rxt_dist.model.fused import Chain

IGNORE = -100
# On CPU a chunk has at most this many rows, so that its logits stay near the cache: 1,024 x 32,000 bfloat16 logits take
# 244 ms in chunks of 256 rows and 267 ms at once, with four times the memory.
_CPU_CHUNK = 256


class ClassifierSums(NamedTuple):
    """loss: summed cross-entropy, float32; targets: how many were counted; correct: how many of them were predicted.

    losses_N, hits_N: float32 and bool, the same of each target, without a gradient; 0 and False where none counts.
    """

    loss: Tensor
    targets: Tensor
    correct: Tensor
    losses_N: Tensor
    hits_N: Tensor


class _ChunkSums(NamedTuple):
    """Of a chunk of rows: loss and hit of each, and where gradients are wanted d loss / d logits and its sum over rows.

    grad_CV: in the logits' type, softmax - one-hot in every row: where a target does not count it ought to be 0, and
    that 0 multiplies the narrow factors of the products that follow. grad_bias_V: float32, of the rows that count.
    """

    losses_C: Tensor
    hits_C: Tensor
    grad_CV: Tensor
    grad_bias_V: Tensor


def _chunk_formula(low_CV: Tensor, room_CV: Tensor, targets_C: Tensor, needs_grad: bool) -> _ChunkSums:
    logits_CV, kept_C, index_C = low_CV.float(), targets_C != IGNORE, targets_C.clamp_min(0)
    log_total_C, guess_C = logits_CV.logsumexp(-1), logits_CV.argmax(-1)
    picked_C = logits_CV.gather(1, index_C.unsqueeze(1)).squeeze(1)
    losses_C, hits_C = (log_total_C - picked_C) * kept_C, (guess_C == targets_C) & kept_C
    if not needs_grad:
        return _ChunkSums(losses_C, hits_C, low_CV, low_CV[0])
    words_V = torch.arange(logits_CV.shape[1], device=logits_CV.device)
    grad_CV = (logits_CV - log_total_C.unsqueeze(1)).exp() - (words_V == index_C.unsqueeze(1)).float()
    return _ChunkSums(losses_C, hits_C, grad_CV.to(low_CV.dtype), (grad_CV * kept_C.unsqueeze(1)).sum(0))


def _chunk_eager(low_CV: Tensor, room_CV: Tensor, targets_C: Tensor, needs_grad: bool) -> _ChunkSums:
    """The same in place, in the float32 `room_CV` and in the logits themselves."""
    kept_C, index_C1 = targets_C != IGNORE, targets_C.clamp_min(0).unsqueeze(1)
    logits_CV = room_CV.copy_(low_CV)
    highest_C, guess_C = logits_CV.max(-1)
    picked_C = logits_CV.gather(1, index_C1).squeeze(1)
    # In place: one fused pass over each row. The highest probability is 1 / sum exp(logit - highest).
    probs_CV = torch.softmax(logits_CV, -1, out=logits_CV)
    log_total_C = highest_C - probs_CV.gather(1, guess_C.unsqueeze(1)).squeeze(1).log()
    losses_C, hits_C = (log_total_C - picked_C) * kept_C, (guess_C == targets_C) & kept_C
    if not needs_grad:
        return _ChunkSums(losses_C, hits_C, low_CV, low_CV[0])
    grad_CV = probs_CV.scatter_add_(1, index_C1, probs_CV.new_full(index_C1.shape, -1))
    return _ChunkSums(losses_C, hits_C, low_CV.copy_(grad_CV), grad_CV.t() @ kept_C.float())


_chunk_sums = Chain(_chunk_formula, _chunk_eager)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        targets_N: Tensor,
        chunk_tokens: int,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses_N = torch.empty(targets_N.shape, dtype=torch.float32, device=hidden_ND.device)
        hits_N = torch.empty_like(losses_N, dtype=torch.bool)
        # Sums over chunks accumulate in float32 whatever the parameters' type.
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_grad else None
        # The logits' memory is taken once for all chunks, and uncompiled it serves for their gradient too.
        shape = (min(chunk_tokens, hidden_ND.shape[0]), weight_VD.shape[0])
        room_CV = hidden_ND.new_empty(shape)
        alone = room_CV.dtype == torch.float32 or _chunk_sums.compiled
        float_room_CV = room_CV if alone else room_CV.new_empty(shape, dtype=torch.float32)
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            low_CV = room_CV[: len(targets_C)]
            torch.addmm(bias_V, hidden_CD, weight_VD.t(), out=low_CV)
            sums = _chunk_sums(low_CV, float_room_CV[: len(targets_C)], targets_C, needs_grad)
            losses_N[rows] = sums.losses_C
            hits_N[rows] = sums.hits_C
            if grad_weight_VD is None or grad_bias_V is None or grad_hidden_ND is None:
                continue
            grad_bias_V += sums.grad_bias_V
            grad_CV, kept_C1 = sums.grad_CV, (targets_C != IGNORE).unsqueeze(1).to(hidden_ND.dtype)
            torch.mm(grad_CV, weight_VD, out=grad_hidden_ND[rows]).mul_(kept_C1)
            if grad_CV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD * kept_C1)
            else:
                # Rounded once a chunk, as products of bfloat16 are; their sum is not.
                grad_weight_VD += grad_CV.t() @ (hidden_CD * kept_C1)
        ctx.mark_non_differentiable(losses_N, hits_N)
        if needs_grad:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
            ctx.types = weight_VD.dtype, bias_V.dtype
        return losses_N.sum(), losses_N, hits_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_hidden_ND, grad_weight_VD, grad_bias_V = ctx.saved_tensors
        weight_type, bias_type = ctx.types
        return (
            grad_hidden_ND * scale.to(grad_hidden_ND.dtype),
            grad_weight_VD.mul_(scale).to(weight_type),
            grad_bias_V.mul_(scale).to(bias_type),
            None,
            None,
            None,
        )


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, chunk_tokens: int
) -> ClassifierSums:
    """Summed cross-entropy of softmax(hidden W^T + b) against int64 targets; -100 is not counted.

    Memory beyond the inputs: chunk_tokens * V float32 plus one float32 gradient of W. May be differentiated once.
    """
    hidden_ND, targets_N = hidden_ND.flatten(0, -2), targets_N.flatten()
    if hidden_ND.device.type == "cpu":
        chunk_tokens = min(chunk_tokens, _CPU_CHUNK)
    # Asked here: inside the function gradients are always off, and its own record says yes even under no_grad.
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (hidden_ND, weight_VD, bias_V))
    found = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, chunk_tokens, needs_grad)
    loss, losses_N, hits_N = found
    return ClassifierSums(loss, (targets_N != IGNORE).sum(), hits_N.sum(), losses_N, hits_N)
