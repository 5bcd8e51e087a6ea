"""The few collective operations outside the engine proper, with the same meaning on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rxt_dist.errors import UserError

T = TypeVar("T")


class Collectives:
    """Rank, world size, and reductions over all ranks; without a process group a world of one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.distributed = dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks, on the engine's device."""
        values = values.to(self.device)
        if self.distributed:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on all ranks if true on any."""
        if not self.distributed:
            return flag
        return bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on all ranks (small picklable objects)."""
        if not self.distributed:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank and gather the (picklable) results; if any rank refuses, all raise its UserError.

        Without this an error on one rank would leave all others waiting for it for ever.
        """
        outcome: tuple[T | None, UserError | None]
        try:
            outcome = (action(), None)
        except UserError as error:
            outcome = (None, error)
        outcomes = self.gather(outcome)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]
