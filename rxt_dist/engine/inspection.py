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
    *,
    backward: bool,
) -> NonFinite | None:
    """Compute this rank's micro-batches once more and watch what each layer gives.

    The forward pass is looked at first, then the gradients of the layers' outputs, from the last layer to the first.
    None: it was not met again (a fault of a device, or one that lies in a sum over ranks). All ranks call it together.

    Args:
        sums: the counts of this global batch. backward: whether gradients are looked at too.
    """
    found: NonFinite | None = None
    for number, micro in enumerate(micros):
        with _watched(stage.model) as watch, torch.set_grad_enabled(backward):
            output = forward(micro.to(sums.ranks.device), routing.load_ME)
            if watch.first:
                loss = objective(output.sums_J, sums.counts_J, sums.weights_J)
                # Of activations: parameters get no gradients, and nothing that hangs on theirs happens.
                torch.autograd.grad(loss, watch.first, allow_unused=True)
        if found is None and watch.met:
            layer, in_gradient, place = watch.met[0]
            found = NonFinite(layer, in_gradient, number, place)
    return found


class _Watch:
    """What a pass has shown: layers that were not finite, whether in a gradient, and the how-manieth look it was.

    first: the outputs at which gradients end, of layers whose own inputs have none.
    """

    def __init__(self) -> None:
        self.met: list[tuple[str, bool, int]] = []
        self._looks = 0
        self.first: list[Tensor] = []

    def output(self, name: str, given: Any, value: Any) -> None:
        is_first = not any(tensor.requires_grad for tensor in _tensors(given))
        for tensor in _tensors(value):
            if not tensor.is_floating_point():
                continue
            self._look(name, tensor, backward=False)
            if tensor.requires_grad:
                if is_first:
                    self.first.append(tensor)
                tensor.register_hook(lambda gradient, name=name: self._look(name, gradient, backward=True))

    def _look(self, name: str, tensor: Tensor, *, backward: bool) -> None:
        self._looks += 1
        if not bool(torch.isfinite(tensor).all()):
            self.met.append((name, backward, self._looks))


@contextmanager
def _watched(model: nn.Module) -> Iterator[_Watch]:
    """Watch what every module of `model` gives while the block lasts.

    Routed blocks are looked at from outside: in AutoEP's there are rows of nobody, whose numbers are undefined.
    """
    watch = _Watch()
    handles = [
        module.register_forward_hook(
            lambda _, given, named, value, name=name: watch.output(name, (given, *named.values()), value),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name and ".routed." not in name
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
