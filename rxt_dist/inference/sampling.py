"""Which token comes next: from the logits of one row, its settings and its generator."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rxt_dist.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    temperature: 0 takes the most probable token.
    top_k: only so many of the most probable, and whatever is as probable as the last of them; 0: all.
    top_p: only the most probable ones that together come to this probability.
    max_tokens: most tokens of an answer; None: what the model's row has room for.
    suppress: leave out control tokens that an answer never has at this place; off, what an untrained model says is
        what its logits say.

    Raises:
        ConfigError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int | None = None
    suppress: bool = True

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "a number from 0 on"),
            ("top_k", self.top_k >= 0, "a whole number from 0 (all) on"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (all)"),
            ("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "a whole number from 1 on"),
        )
        for name, fits, wanted in ranges:
            if not fits:
                raise ConfigError(f"{name} is {getattr(self, name)}, but it must be {wanted}.")


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator, banned: Tensor | None = None) -> int:
    """The next token.

    Args:
        logits_V: float32, on the host, whatever the model runs on: a seed gives the same tokens everywhere.
        banned: ids that are not taken, int64.
    """
    if banned is not None:
        logits_V = logits_V.index_fill(0, banned, -torch.inf)
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < len(logits_V):
        logits_V = logits_V.masked_fill(logits_V < logits_V.topk(sampling.top_k).values[-1], -torch.inf)
    probabilities_V = logits_V.softmax(-1)
    if sampling.top_p < 1:
        ordered, ids = probabilities_V.sort(descending=True, stable=True)
        # What stands before a token decides: the one that passes the bound is still taken.
        past = ordered.cumsum(-1) - ordered >= sampling.top_p
        probabilities_V = probabilities_V.index_fill(0, ids[past], 0.0)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
