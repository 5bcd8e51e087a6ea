"""The few collective operations outside the engine proper, with the same meaning on one rank.

What ranks tell each other is numbers and JSON: nothing that comes from another process is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rxt_dist.engine.rendezvous import side_channel
from rxt_dist.errors import UserError, error_class


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
        return self.agree(flag)[0]

    def agree(self, *flags: bool) -> tuple[bool, ...]:
        """`any` of several flags by one reduction."""
        if not self.distributed:
            return flags
        return tuple(bool(count) for count in self.sum(torch.tensor(flags, dtype=torch.int32)).tolist())

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order, on all ranks. They are JSON values: lists come back for tuples."""
        text = json.dumps(value, allow_nan=False).encode()
        if not self.distributed:
            return [json.loads(text)]
        own = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        sizes = self._gather(torch.tensor([len(own)]))
        room = torch.zeros(int(sizes.max()), dtype=torch.uint8)
        room[: len(own)] = own
        texts = self._gather(room)
        return [json.loads(bytes(row[:size].tolist())) for row, size in zip(texts, sizes[:, 0].tolist(), strict=True)]

    def together(self, action: Callable[[], Any]) -> list[Any]:
        """Run `action` on every rank and gather the results (JSON values); if any rank fails, all do.

        Without this an error on one rank would leave all others waiting for it for ever.

        Raises:
            UserError: the first that a rank raised, on all ranks.
            Exception: any other error, on the rank that met it.
            RuntimeError: any other error of another rank.
        """
        value, mine = None, None
        try:
            value = action()
            # A value that cannot be told is found before anything is told: else the others would wait for it.
            json.dumps(value, allow_nan=False)
        except Exception as error:
            mine = error
        outcomes = self.gather({"value": None if mine else value, "error": mine and [type(mine).__name__, str(mine)]})
        if mine is not None and not isinstance(mine, UserError):
            raise mine
        failures = [(rank, *outcome["error"]) for rank, outcome in enumerate(outcomes) if outcome["error"]]
        for rank, name, text in failures:
            known = error_class(name)
            if known is None:
                continue
            shared = mine if rank == self.rank and isinstance(mine, UserError) else known(text)
            shared.common = True
            raise shared
        for rank, name, text in failures:
            raise RuntimeError(f"rank {rank} failed: {name}: {text}")
        return [outcome["value"] for outcome in outcomes]

    def open_channel(self, purpose: str) -> dist.Store | None:
        """See `side_channel`. None where there is no other rank."""
        return side_channel(purpose) if self.world_size > 1 else None

    def _gather(self, values: Tensor) -> Tensor:
        """The rows [n] of all ranks as [ranks, n], in host memory."""
        values = values.to(self.device)
        rows = torch.empty((self.world_size, *values.shape), dtype=values.dtype, device=self.device)
        dist.all_gather(list(rows), values)
        return rows.cpu()
