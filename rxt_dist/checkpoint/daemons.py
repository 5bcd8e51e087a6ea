"""Work on several files at once, by threads that no process waits for when it ends."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from queue import Empty, SimpleQueue
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # A matter of Linux.
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_on_daemons(action: Callable[[T], R], items: Iterable[T], threads: int) -> list[R]:
    """What `action` makes of every item, in their order.

    An executor's threads are joined when the interpreter ends: one that hangs in the file system would keep a process
    that a person or a scheduler wants to end.

    Raises:
        Exception: of the first item, in their order, that met one; later ones may not have been begun.
    """
    waiting: SimpleQueue[tuple[int, T]] = SimpleQueue()
    count = 0
    for numbered in enumerate(items):
        waiting.put(numbered)
        count += 1
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}

    def work() -> None:
        while not errors:
            try:
                number, item = waiting.get_nowait()
            except Empty:
                return
            try:
                results[number] = action(item)
            except BaseException as error:
                errors[number] = error

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(threads, count))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if errors:
        raise errors[min(errors)]
    return [results[number] for number in range(count)]
