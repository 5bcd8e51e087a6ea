"""A second look at a step whose update was skipped: where in the network numbers first stopped being finite.

It is taken only when that has happened, and changes nothing: neither gradients nor weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rxt_dist.engine.interface import NonFinite
from rxt_dist.engine.routing import RoutingState
from rxt_dist.engine.sums import StepSums
from rxt_dist.losses import StageOutput, objective
from rxt_dist.stages.base import MicroBatch, Stage


def first_nonfinite(
    stage: Stage,
    forward: Callable[[Any, Tensor], StageOutput],
    micros: Sequence[MicroBatch],
    sums: StepSums,
    routing: RoutingState,
) -> NonFinite | None:
    """Compute this rank's micro-batches once more and watch what each layer gives.

    The forward pass is looked at first, then the gradients of the layers' outputs, from the last layer to the first.
    None: it was not met again (a fault of a device, or one that lies in a sum over ranks). All ranks call it together.

    Args:
        sums: the counts of this global batch.
    """
    found: NonFinite | None = None
    for number, micro in enumerate(micros):
        with _watched(stage.model) as watch, torch.enable_grad():
            output = forward(micro.to(sums.ranks.device), routing.load_ME)
            loss = objective(output.sums_J, sums.counts_J, sums.weights_J)
            if watch.inputs:
                # Of an activation: parameters get no gradients, and nothing that hangs on theirs happens.
                torch.autograd.grad(loss, watch.inputs[:1], allow_unused=True)
        met = watch.forward or watch.backward
        if found is None and met:
            found = NonFinite(met[0], not watch.forward, number)
    return found


class _Watch:
    """What a pass has shown: layers in the order in which they were not finite, and the outputs that can be derived."""

    def __init__(self) -> None:
        self.forward: list[str] = []
        self.backward: list[str] = []
        self.inputs: list[Tensor] = []

    def output(self, name: str, value: Any) -> None:
        for tensor in _tensors(value):
            if not tensor.is_floating_point():
                continue
            if not bool(torch.isfinite(tensor).all()):
                self.forward.append(name)
            if tensor.requires_grad:
                self.inputs.append(tensor)
                tensor.register_hook(lambda gradient, name=name: self._gradient(name, gradient))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        if not bool(torch.isfinite(gradient).all()):
            self.backward.append(name)


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Watch what every module of `model` gives while the block lasts."""
    watch = _Watch()
    handles = [
        module.register_forward_hook(lambda _, __, value, name=name: watch.output(name, value))
        for name, module in model.named_modules()
        if name
    ]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what a module returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
