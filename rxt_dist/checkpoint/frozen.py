"""Weights that a stage builds but does not train: part of every checkpoint, and of no engine's state.

An engine may round them to bfloat16 and spread them as it likes. What is saved is the float32 original, of which each
rank keeps its share in host memory, so that a later stage which trains them again begins from what was learnt.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.store import Checkpoint
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import WEIGHT, Fragment


class FrozenWeights:
    """This rank's share of the frozen weights; made after they have their values and before an engine takes them.

    model_names: all parameters of the model, trained and frozen.
    """

    def __init__(self, model: nn.Module, ranks: Collectives) -> None:
        self._shares: list[Fragment] = []
        self.model_names = {name for name, _ in model.named_parameters()}
        for name, parameter in _frozen(model):
            size = parameter.numel()
            first, last = (size * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
            if first < last:
                share = parameter.detach().flatten()[first:last].to("cpu", torch.float32, copy=True)
                self._shares.append(Fragment(name, first, {WEIGHT: share}))

    def fragments(self) -> Iterator[Fragment]:
        """The pieces that this rank saves; among all ranks every element once."""
        yield from self._shares


def load_frozen(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Fill the frozen weights of a float32 model from a checkpoint.

    Raises:
        CheckpointError: the checkpoint lacks one of them.
    """
    frozen = list(_frozen(model))
    if frozen:
        saved = SavedPieces(checkpoint)
        for name, parameter in frozen:
            saved.fill(WEIGHT, name, 0, parameter.data.view(-1))


def _frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
