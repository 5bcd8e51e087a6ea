"""Timing, memory and waits on a device; on the CPU, for dry runs, the same with the clock of the host."""

from __future__ import annotations

import gc
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Written between measurements, so that inputs do not lie in the cache from the round before (H200: 60 MB).
_CACHE_BYTES = 256 << 20


class Device:
    """The device that is measured."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.cuda = torch.cuda.is_available() and not dry
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")
        self._cache = torch.empty(_CACHE_BYTES if self.cuda else 1, dtype=torch.uint8, device=self.device)

    def synchronize(self) -> None:
        """Wait for all that was started."""
        if self.cuda:
            torch.cuda.synchronize()

    def milliseconds(self, action: Callable[[], Any], rounds: int = 10, warmup: int = 3) -> float:
        """Median time of an action on the device, with cold caches."""
        if self.dry:
            rounds, warmup = 2, 1
        for _ in range(warmup):
            action()
        times = []
        for _ in range(rounds):
            self._cache.zero_()
            times.append(self._once(action))
        return statistics.median(times)

    def _once(self, action: Callable[[], Any]) -> float:
        if not self.cuda:
            began = time.perf_counter()
            action()
            return (time.perf_counter() - began) * 1e3
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        action()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop)

    def wall_milliseconds(self, action: Callable[[], Any]) -> float:
        """Time of an action by the clock of the host, to the end of all that it started."""
        self.synchronize()
        began = time.perf_counter()
        action()
        self.synchronize()
        return (time.perf_counter() - began) * 1e3

    def forget_peak(self) -> None:
        """Begin a new measurement of peak memory."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float:
        """The most memory that tensors held since then; on the CPU the process's own peak."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 1e9
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6

    def free(self) -> None:
        """Give back what nothing refers to any more."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def waits(self, action: Callable[[], Any]) -> int | str:
        """How often the host waited for the device in an action."""
        if not self.cuda:
            action()
            return "not on a CPU"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                action()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(one.message) for one in caught)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that something smaller may fit."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("out of memory" in text or "CUBLAS_STATUS_ALLOC_FAILED" in text)


@contextmanager
def fitting(device: Device) -> Iterator[list[str]]:
    """A block that may run out of memory: the list then holds a word about it, and the memory is free again."""
    outcome: list[str] = []
    try:
        yield outcome
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        outcome.append("out of memory")
        # The traceback holds the frames, and they hold the tensors.
        error.__traceback__ = None
    device.free()
