"""Imports that take seconds, without the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What is imported in this block stays until the process ends, so no collection of garbage looks for it.

    Torch and DeepSpeed leave a million objects. Every whole collection would walk through all of them, a quarter of a
    second at a time: ten times while they are imported, once an engine is made, and whenever one comes due in training.
    """
    known, enabled = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Also frozen is all else that exists, for which there is no reason where everything was there before.
        if len(sys.modules) > known:
            gc.freeze()
        if enabled:
            gc.enable()
