"""A sign of life every ten seconds from work that says nothing itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS = 10.0


@contextmanager
def heartbeat(describe: Callable[[], str], say: Callable[[str], None]) -> Iterator[None]:
    """While the body runs, say every ten seconds what `describe` tells, and the seconds that have passed.

    Both are called from a thread of their own.
    """
    started, ended = time.monotonic(), threading.Event()

    def beat() -> None:
        while not ended.wait(SECONDS):
            say(f"{describe()}, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
