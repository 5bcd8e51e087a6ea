"""Room for the weights of a network that was built without any (on torch's meta device).

A rank never holds what it does not keep: under ZeRO-3 each module is divided as soon as it has room, and experts that
are split over ranks get none before they are split. What stands in the room is undefined; weights come through the
engine's fragments, whatever they come from (a seed, another run, a checkpoint).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from rxt_dist.model.experts import ExpertStack


def materialise(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    split_experts: bool = False,
    divide: Callable[[Sequence[nn.Parameter]], None] | None = None,
) -> None:
    """Replace all parameters on the meta device by ones on `device`; others stay as they are.

    Args:
        split_experts: stacks of experts will be split over ranks: all their numbers are one, which takes no memory.
        divide: called with the parameters of each module that are not such stacks.
    """
    for module in model.modules():
        placeholder = split_experts and isinstance(module, ExpertStack)
        made: list[nn.Parameter] = []
        for field, parameter in module.named_parameters(recurse=False):
            if not parameter.is_meta:
                continue
            shape = parameter.shape
            room = torch.zeros((), dtype=dtype, device=device).expand(shape) if placeholder else None
            room = torch.empty(shape, dtype=dtype, device=device) if room is None else room
            made.append(nn.Parameter(room, parameter.requires_grad))
            setattr(module, field, made[-1])
        if divide is not None and made and not placeholder:
            divide(made)
