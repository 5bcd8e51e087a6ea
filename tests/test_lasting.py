"""Imports without the garbage collector."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import gc, sys
from rxt_dist.lasting import lasting_imports
collected = []
gc.callbacks.append(lambda phase, info: collected.append(info["generation"]))
with lasting_imports():
    import numpy
assert not collected, collected
assert gc.isenabled()
frozen = gc.get_freeze_count()
assert frozen > 10_000, frozen
kept = [[] for _ in range(1000)]
with lasting_imports():
    import numpy
assert gc.get_freeze_count() <= frozen
gc.disable()
with lasting_imports():
    pass
assert not gc.isenabled()
"""


def test_nothing_is_collected_and_what_was_imported_is_never_looked_at_again() -> None:
    """And where nothing is imported, nothing is frozen; a collector that was off stays off."""
    subprocess.run([sys.executable, "-c", CODE], check=True)
