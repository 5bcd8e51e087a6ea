"""Shared test set-up; the tiny model of most tests is in tiny.py."""

import os

# Tensors of tests are tiny: more threads gain nothing, and on busy cores they wait for each other (100 times slower).
os.environ.setdefault("OMP_NUM_THREADS", "1")
