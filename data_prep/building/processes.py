"""Worker processes, forked from a server that has imported what they need.

They may not be forked from the process that asks for them: a tokenizer's threads do not survive a fork, and locks must
not be inherited. The server has neither. A process that is spawned instead imports for half a second of a processor.
"""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext

# What the server of this process imports when the first worker is asked for; what it cannot, workers import themselves.
IMPORTED = ["data_prep.building.encode", "data_prep.building.workers"]


def worker_context() -> ForkServerContext:
    """Where worker processes come from."""
    # Read by Arrow when it is loaded, so by the workers only: its own allocators keep what they have been given.
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context
