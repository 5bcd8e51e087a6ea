"""Shared test set-up; the tiny model of most tests is in tiny.py."""

import gc
import os
from collections.abc import Generator

import pytest

# Tensors of tests are tiny: more threads gain nothing, and on busy cores they wait for each other (100 times slower).
os.environ.setdefault("OMP_NUM_THREADS", "1")


def _written(file: int) -> None:
    """In place of fsync: refuses what that would refuse, and does not wait for the disk.

    A third of the tests' time went into it, though it protects from a power cut alone, which no test brings about.
    Where its order matters, a test looks at the calls. Processes of their own keep the real one.
    """
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = _written


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    _keep_what_is_there()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    done = yield
    if nextitem is None or nextitem.path != item.path:
        _keep_what_is_there()
    return done


def _keep_what_is_there() -> None:
    """What was imported stays: every collection of garbage would walk through all of it, a fifth of a second a time."""
    gc.collect()
    gc.freeze()
