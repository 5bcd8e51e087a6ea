"""How often to save: what a save costs against what a failure throws away."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class SaveCost:
    """Seconds that training waits for a save, and seconds until it is committed."""

    stall: float
    written: float


def best_interval(cost: SaveCost, between_failures: float) -> float:
    """Seconds between saves that lose the least time, where failures come by chance every `between_failures` seconds.

    Daly's estimate (2006, of higher order than Young's sqrt(2 * cost * between_failures)); no less than a save takes to
    be written, as there are never two at once.
    """
    stall = max(cost.stall, 1e-3)
    if stall >= 2 * between_failures:
        return max(between_failures, cost.written)
    ratio = stall / (2 * between_failures)
    daly = math.sqrt(2 * stall * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - stall
    return max(daly, cost.written)


def lost_share(cost: SaveCost, between_failures: float, interval: float) -> float:
    """Share of the time that goes into waiting for saves and into steps that are done again: half an interval, and what
    was not committed yet, for each failure."""
    return cost.stall / interval + (interval / 2 + cost.written) / between_failures


def measured_cost(events: Iterable[Mapping[str, Any]]) -> SaveCost | None:
    """The medians of a run's saves in the background, by its events; None where there was none."""
    saves = [event for event in events if event.get("kind") == "save" and "stall_s" in event]
    behind = [event for event in saves if event["stall_s"] < event["seconds"]]
    if not behind:
        return None
    return SaveCost(median(event["stall_s"] for event in behind), median(event["seconds"] for event in behind))
