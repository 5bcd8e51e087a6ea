"""What a piece of work cost this process and its children: CPU time and memory. Standard library alone."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from types import TracebackType

_BLOCKS = 5


class Cost:
    """Measures the work inside a `with`: `cpu_s` (user and system, of ended children too) and `wall_s`."""

    def __enter__(self) -> Cost:
        self._cpu, self._wall = cpu_seconds(), time.perf_counter()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.cpu_s, self.wall_s = cpu_seconds() - self._cpu, time.perf_counter() - self._wall


def cpu_seconds() -> float:
    """CPU time so far of this process and its ended children."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def peak_mb() -> float:
    """The largest resident set, in MB (2**20), of this process or of any ended child."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usage.ru_maxrss for usage in used) / 1024


def cpu_per_call(work: Callable[[], object], calls: int, clock: Callable[[], float] = cpu_seconds) -> float:
    """CPU seconds of one call: the median over five blocks of `calls` calls, after a few to warm up."""
    for _ in range(20):
        work()
    taken = []
    for _ in range(_BLOCKS):
        began = clock()
        for _ in range(calls):
            work()
        taken.append((clock() - began) / calls)
    return statistics.median(taken)
