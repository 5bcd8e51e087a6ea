"""Choices about the device and memory of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import psutil, torch
from rxt_dist.engine.build import keep_freed_memory
if {keep}:
    keep_freed_memory()
block = torch.ones(64 << 20, dtype=torch.uint8)
with_block = psutil.Process().memory_info().rss
del block
print(with_block - psutil.Process().memory_info().rss)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_freed_memory_stays_with_the_process(keep: bool) -> None:
    done = subprocess.run([sys.executable, "-c", HELD.format(keep=keep)], capture_output=True, text=True, check=True)
    given_back = int(done.stdout)
    assert given_back < 8 << 20 if keep else given_back > 56 << 20
