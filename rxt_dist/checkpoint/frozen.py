"""Weights that a stage builds but does not train: part of every checkpoint, and of no engine's training state.

An engine may round them to bfloat16 and spread them as it likes. What is saved is the float32 original, of which each
rank keeps its share in host memory, so that a later stage which trains them again begins from what was learnt.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import WEIGHT, Fragment


class FrozenWeights:
    """This rank's share of the frozen weights, made before an engine takes the model.

    A model without weights (meta) gives shares without values: they are written into `fragments`, as the engine's own
    are.

    model_names: all parameters of the model, trained and frozen.
    """

    def __init__(self, model: nn.Module, ranks: Collectives) -> None:
        self._shares: list[Fragment] = []
        self.model_names = {name for name, _ in model.named_parameters()}
        for name, parameter in _frozen(model):
            size = parameter.numel()
            first, last = (size * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
            if first < last:
                share = torch.empty(last - first)
                if not parameter.is_meta:
                    share.copy_(parameter.detach().flatten()[first:last])
                self._shares.append(Fragment(name, first, {WEIGHT: share}))

    def fragments(self) -> Iterator[Fragment]:
        """The pieces that this rank saves, float32 views; among all ranks every element once."""
        yield from self._shares


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
