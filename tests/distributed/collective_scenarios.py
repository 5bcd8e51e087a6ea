"""What ranks tell each other, for `harness.Ranks.run`."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import torch
from harness import RankContext

from rxt_dist.engine.build import joined_ranks
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError, UserError


def talk(context: RankContext) -> dict[str, Any]:
    """Values of different lengths, flags, a channel used by a thread while the main threads reduce."""
    with joined_ranks(torch.device("cpu"), plain=False) as group:
        values = group.gather({"rank": context.rank, "text": "ż" * context.rank, "none": None})
        flags = group.agree(context.rank == 1, False, True)
        heard: list[str] = []
        thread = threading.Thread(target=_exchange, args=(group, heard))
        thread.start()
        total = sum(group.sum(torch.tensor([1.0])).item() for _ in range(200))
        thread.join()
        return {"values": values, "flags": list(flags), "total": total, "heard": heard, "ports": _listening()}


def _exchange(group: Collectives, heard: list[str]) -> None:
    store = group.open_channel("test")
    assert store is not None
    store.set(f"from/{group.rank}", f"rank {group.rank}")
    heard += [store.get(f"from/{rank}").decode() for rank in range(group.world_size)]


def _listening() -> list[str]:
    """Addresses (hex) on which some process of this machine listens at the store's port."""
    import os

    port = f":{int(os.environ['MASTER_PORT']):04X}"
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return [row[1].removesuffix(port) for row in rows if row[3] == "0A" and row[1].endswith(port)]


def fail_together(context: RankContext, kind: str) -> list[str]:
    """What each rank gets to know when rank 1 fails in a common action."""

    def action() -> float:
        if context.rank == 1 and kind == "no JSON":
            return math.nan
        if context.rank == 1:
            raise CheckpointError("no such step") if kind == "user" else ValueError("a slip")
        return context.rank

    with joined_ranks(torch.device("cpu"), plain=False) as group:
        try:
            group.together(action)
        except (UserError, ValueError, RuntimeError) as error:
            return [type(error).__name__, str(error)]
        return []
