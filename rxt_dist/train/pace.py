"""How fast each rank is, beside the others: what it waited for its data, and how long it takes for one small product.

Ranks that train together take equally long for a step, since the fast ones wait for the slow ones inside it: times of
steps cannot tell which is which. So each rank times a product of its own on its device, with every log line.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median_low

import torch

from rxt_dist.engine.collectives import Collectives

# A rank is slow that takes so much longer than the median, so many lines in a row.
SLOW_RATIO, SLOW_LINES = 1.3, 5
# Data is short where a rank waited for it this share of the time, and more than a second.
_STARVED_SHARE, _STARVED_SECONDS = 0.2, 1.0
_REPEATS = 3
# Rows and columns of the product: about a millisecond on one core, a tenth of that on a GPU.
_CPU_SIZE, _GPU_SIZE = 256, 2048


@dataclass(frozen=True)
class PaceOfRanks:
    """waited: the longest that a rank waited for its data, in seconds; waiting: that rank. slow: (rank, ratio to the
    median) of those that are slow for long enough to be told."""

    waited: float
    waiting: int
    slow: list[tuple[int, float]]

    def is_starved(self, seconds: float) -> bool:
        """Whether data held up an interval of so many seconds."""
        return self.waited > max(_STARVED_SECONDS, _STARVED_SHARE * seconds)


class Pace:
    """Measures at every log line, all ranks together."""

    def __init__(self, ranks: Collectives) -> None:
        self._ranks = ranks
        self._slow_lines = [0] * ranks.world_size

    def exchange(self, waited: float) -> PaceOfRanks:
        """Measure, and tell the others.

        Args:
            waited: seconds that this rank has waited for its data since the last line.
        """
        ranks = self._ranks
        if ranks.world_size == 1:
            return PaceOfRanks(waited, 0, [])
        table = torch.zeros((ranks.world_size, 2), dtype=torch.float64)
        table[ranks.rank] = torch.tensor([waited, product_seconds(ranks.device)], dtype=torch.float64)
        waits, products = ranks.sum(table).T.tolist()
        longest = max(waits)
        return PaceOfRanks(longest, waits.index(longest), self._slow(products))

    def _slow(self, products: list[float]) -> list[tuple[int, float]]:
        """Told once for each time that a rank becomes slow."""
        usual = median_low(products)
        told = []
        for rank, seconds in enumerate(products):
            is_slow = seconds > SLOW_RATIO * usual
            self._slow_lines[rank] = self._slow_lines[rank] + 1 if is_slow else 0
            if self._slow_lines[rank] == SLOW_LINES:
                told.append((rank, seconds / usual))
        return told


def product_seconds(device: torch.device) -> float:
    """The shortest of a few times that a fixed product takes on this rank's device."""
    cuda = device.type == "cuda"
    size, dtype = (_GPU_SIZE, torch.bfloat16) if cuda else (_CPU_SIZE, torch.float32)
    factor = torch.ones((size, size), dtype=dtype, device=device)
    times = []
    for _ in range(_REPEATS + 1):  # The first chooses kernels, or fills caches.
        if cuda:
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = factor @ factor
        if cuda:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
        del product
    return min(times[1:])
