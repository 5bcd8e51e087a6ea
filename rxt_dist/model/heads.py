"""Output heads: from hidden states to summed cross-entropies, never to a whole matrix of logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from rxt_dist.model.cross_entropy import ClassifierSums, linear_cross_entropy


class LanguageModelHead(nn.Module):
    """Linear(D, V) with bias, not tied to the embedding."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.output = nn.Linear(dim, vocab_size)

    def forward(self, hidden_ND: Tensor, targets_N: Tensor, chunk_tokens: int) -> ClassifierSums:
        """Summed cross-entropy and hits over targets other than -100; at most `chunk_tokens` rows of logits exist."""
        return linear_cross_entropy(hidden_ND, self.output.weight, self.output.bias, targets_N, chunk_tokens)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [..., V] (inference)."""
        return self.output(hidden_ND)


class MaskedLanguageModelHead(nn.Module):
    """Linear(D, D) -> GELU -> LayerNorm -> Linear(D, V), applied to masked positions only."""

    def __init__(self, dim: int, vocab_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, vocab_size)

    def forward(self, hidden_PD: Tensor, targets_P: Tensor, chunk_tokens: int) -> ClassifierSums:
        """As `LanguageModelHead.forward`, for the P masked positions."""
        return linear_cross_entropy(
            self._transform(hidden_PD), self.output.weight, self.output.bias, targets_P, chunk_tokens
        )

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """Logits [..., V]."""
        return self.output(self._transform(hidden_PD))

    def _transform(self, hidden_PD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(hidden_PD)))
