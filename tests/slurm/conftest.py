"""One rack for all tests, and what runs on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster_run import OTHER_USER, ClusterRun
from rack import Rack, Shape, missing
from training_run import build_shards


@pytest.fixture(scope="session")
def rack() -> Iterator[Rack]:
    why = missing()
    if why is not None:
        pytest.skip(why)
    # Short: the name of a socket stands below it. All nodes see this folder, as a cluster's common disk.
    folder = Path(tempfile.mkdtemp(prefix="rxt-rack-", dir="/tmp"))
    rack = Rack(folder, Shape())
    rack.up()
    try:
        yield rack
    finally:
        rack.down()
        if "RXT_KEEP_RACK" not in os.environ:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def shards(rack: Rack) -> Path:
    return build_shards(rack.folder)


@pytest.fixture
def tidy(rack: Rack) -> Iterator[None]:
    """Jobs end with the test; afterwards all nodes are ready again."""
    yield
    for user in ("root", OTHER_USER):
        rack.on_login("scancel", "--full", f"--user={user}", check=False)
    for node in rack.shape.names():
        rack.resume(node)


@pytest.fixture
def new_run(rack: Rack, shards: Path, tidy: None) -> Callable[..., ClusterRun]:
    """Makes runs of their own names."""
    return lambda name, steps=24: ClusterRun(rack, shards, name, steps)


@pytest.fixture(scope="session")
def local(rack: Rack, shards: Path) -> ClusterRun:
    """24 steps on two ranks of this machine, without SLURM."""
    run = ClusterRun(rack, shards, "local", 24)
    run.train_locally()
    return run


@pytest.fixture(scope="session")
def undisturbed(local: ClusterRun) -> list[tuple[float, ...]]:
    """What they give."""
    return local.curve()
