"""Choices about the device and memory of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import psutil, torch
from rxt_dist.engine.build import keep_freed_memory

def given_back(megabytes):
    block = torch.ones(megabytes << 20, dtype=torch.uint8)
    with_block = psutil.Process().memory_info().rss
    del block
    return with_block - psutil.Process().memory_info().rss

print(given_back(24))
keep_freed_memory()
print(given_back(24), given_back(64))
"""


@pytest.mark.slow
def test_freed_memory_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    before, after, large = map(int, done.stdout.split())
    assert before > 20 << 20
    assert after < 4 << 20
    assert large > 56 << 20, "what is kept of large blocks gets split, and the process grows"
