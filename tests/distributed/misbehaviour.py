"""Ranks that fail, for the tests of the harness."""

from __future__ import annotations

import time
from typing import Any

from harness import RankContext


def report(context: RankContext, word: str) -> dict[str, Any]:
    return {"rank": context.rank, "world": context.world_size, "word": word}


def fail(context: RankContext) -> None:
    if context.rank == 1:
        raise ValueError("rank one has had enough")
    time.sleep(60)


def hang(context: RankContext) -> None:
    print(f"rank {context.rank} waits", flush=True)
    time.sleep(60)
