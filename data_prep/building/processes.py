"""Worker processes, forked from a server that has imported what they need.

They may not be forked from the process that asks for them: a tokenizer's threads do not survive a fork, and locks must
not be inherited. A process that is spawned instead imports for half a second of a processor.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, SpawnContext

# What the server of this process imports when the first worker is asked for; what it cannot, workers import themselves.
# Arrow looks for pandas when it is first given a list, which is a sixth of a second of each worker.
IMPORTED = ["data_prep.building.encode", "data_prep.building.workers", "pandas"]
_SAFE_PATH = "PYTHONSAFEPATH"


def worker_context() -> ForkServerContext | SpawnContext:
    """Where worker processes come from; spawned ones where the server cannot be reached, as its socket's path under a
    long TMPDIR is longer than the system allows."""
    # Read by Arrow when it is loaded, so by the workers only: its own allocators keep what they have been given.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    try:
        with safe_path():
            forkserver.ensure_running()
    except OSError:
        return multiprocessing.get_context("spawn")
    return context


@contextmanager
def safe_path() -> Iterator[None]:
    """A server that begins in this block does not look for modules in the current folder, as Python does first where it
    is begun by a line of code."""
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SAFE_PATH]
        else:
            os.environ[_SAFE_PATH] = before
