"""Choices about the device and memory of a process."""

from __future__ import annotations

import subprocess
import sys

import pytest

HELD = """
import psutil, torch
from rxt_dist.engine.build import keep_freed_memory

def given_back():
    block = torch.ones(64 << 20, dtype=torch.uint8)
    with_block = psutil.Process().memory_info().rss
    del block
    return with_block - psutil.Process().memory_info().rss

print(given_back())
keep_freed_memory()
print(given_back())
"""


@pytest.mark.slow
def test_freed_memory_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", HELD], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 56 << 20
    assert after < 8 << 20
