"""Shared test set-up; the tiny model of most tests is in tiny.py."""

import gc
import os
import time
from collections.abc import Generator
from functools import cache, lru_cache, partial
from typing import Any

import pytest
import typer.main
import typer.testing
import yaml

# Tensors of tests are tiny: more threads gain nothing, and on busy cores they wait for each other (100 times slower).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests of these folders share a process that is warm, and wait in between: a queue each, beside all others.
_QUEUES = ("tests/distributed/", "tests/faults/")
# A test that takes longer has mostly imported something.
_LONG_SECONDS = 0.3
# All that the tests import stays; looking for garbage meanwhile takes a fifth of the time.
gc.disable()


# All verbs of an application would be read anew, from their signatures, each time that a test calls one.
typer.main.get_command = typer.testing._get_command = cache(typer.main.get_command)
# The same few configurations are read thousands of times.
yaml.compose = lru_cache(maxsize=200)(yaml.compose)
yaml.safe_load = partial(yaml.load, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _written(file: int) -> None:
    """In place of fsync: refuses what that would refuse, and does not wait for the disk.

    A third of the tests' time went into it, though it protects from a power cut alone, which no test brings about.
    Where its order matters, a test looks at the calls. Processes of their own keep the real one.
    """
    os.fstat(file if isinstance(file, int) else file.fileno())


os.fsync = _written


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, the long ones come first: none is left alone with one at the end."""
    if hasattr(config, "workerinput"):
        long = {item.path for item in items if any(map(item.get_closest_marker, ("distributed", "faults", "slow")))}
        items.sort(key=lambda item: (_scope(item.nodeid) not in _QUEUES, item.path not in long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist=loadfile` a queue goes to one process, and so does each other file."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    return ByFile(config, log)


def _scope(nodeid: str) -> str:
    return next((queue for queue in _QUEUES if nodeid.startswith(queue)), nodeid.split("::", 1)[0])


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, bool, bool]:
    started = time.monotonic()
    done = yield
    # A test that takes long has imported something, and engines that others make look for garbage.
    if nextitem is None or nextitem.path != item.path or time.monotonic() - started > _LONG_SECONDS:
        _keep_what_is_there()
    return done


def _keep_what_is_there() -> None:
    """What was imported stays: every collection of garbage would walk through all of it, a fifth of a second a time."""
    gc.collect()
    gc.freeze()
