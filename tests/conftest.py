"""Shared test set-up; the tiny model of most tests is in tiny.py."""

import os

# Ranks of the gloo tests share two cores; more threads than cores make every collective slower.
os.environ.setdefault("OMP_NUM_THREADS", "2")
