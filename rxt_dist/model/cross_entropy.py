"""Cross-entropy of a linear classifier, in chunks, without ever holding all logits.

At 65,536 words and 8,192 tokens the float32 logits alone are 2.1 GB, and as much again for their gradient. Here a
chunk's logits live only while the chunk is computed: its gradient is formed at once (the loss is a sum, so the
gradient only waits for one scalar factor) and reduced to the gradients of hidden states, weight and bias.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100


class ClassifierSums(NamedTuple):
    """loss: summed cross-entropy, float32; targets: how many were counted; correct: how many of them were predicted."""

    loss: Tensor
    targets: Tensor
    correct: Tensor


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        needs_grad = any(ctx.needs_input_grad[:3])
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        # Sums over chunks accumulate in float32 whatever the parameters' type.
        grad_hidden_ND = torch.empty_like(hidden_ND) if needs_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_grad else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_grad else None
        for start in range(0, hidden_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            logits_CV = torch.addmm(bias_V, hidden_CD, weight_VD.t()).float()
            kept_C = targets_C != IGNORE
            index_C1 = targets_C.clamp_min(0).unsqueeze(1)
            correct += ((logits_CV.argmax(-1) == targets_C) & kept_C).sum()
            picked_C = logits_CV.gather(1, index_C1).squeeze(1)
            log_total_C = logits_CV.logsumexp(-1)
            loss += ((log_total_C - picked_C) * kept_C).sum()
            if grad_weight_VD is None or grad_bias_V is None or grad_hidden_ND is None:
                continue
            # d loss / d logits = softmax - one-hot, zero where the target is ignored; in place over the logits.
            grad_CV = logits_CV.sub_(log_total_C.unsqueeze(1)).exp_()
            grad_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1, dtype=grad_CV.dtype))
            grad_CV.mul_(kept_C.unsqueeze(1))
            grad_bias_V += grad_CV.sum(0)
            grad_CV = grad_CV.to(hidden_ND.dtype)
            grad_hidden_ND[rows] = grad_CV @ weight_VD
            if grad_CV.dtype == torch.float32:
                grad_weight_VD.addmm_(grad_CV.t(), hidden_CD)
            else:
                grad_weight_VD += grad_CV.t() @ hidden_CD
        ctx.mark_non_differentiable(correct)
        if needs_grad:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD, grad_bias_V)
            ctx.types = weight_VD.dtype, bias_V.dtype
        return loss, correct

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
        )


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_N: Tensor, chunk_tokens: int
) -> ClassifierSums:
    """Summed cross-entropy of softmax(hidden W^T + b) against int64 targets; -100 is not counted.

    Memory beyond the inputs: chunk_tokens * V float32 plus one float32 gradient of W. May be differentiated once.
    """
    hidden_ND, targets_N = hidden_ND.flatten(0, -2), targets_N.flatten()
    loss, correct = _LinearCrossEntropy.apply(hidden_ND, weight_VD, bias_V, targets_N, chunk_tokens)
    return ClassifierSums(loss, (targets_N != IGNORE).sum(), correct)
