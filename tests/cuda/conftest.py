"""What needs a GPU to prove: the paths that only CUDA takes, and that a step on it computes what the CPU computes.

The device is chosen in place.py and nowhere else. Without a GPU these tests are skipped; with RXT_CUDA_TESTS=cpu in
the environment the same bodies run on the CPU (tests/test_gpu_dry_run.py), so that nothing in them is run for the first
time where GPU minutes are counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from place import DEVICE, DRY, SAMPLED

from rxt_dist.model.experts import set_grouped_product, torch_product
from rxt_dist.model.fused import compile_chains

HERE = Path(__file__).parent
# cuBLAS is deterministic only with a workspace of a fixed size, which it reads when it is first used.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# The conformance vectors and the tests of them.
sys.path.insert(0, str(HERE.parent / "model"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no GPU."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if DEVICE.type == "cpu" and not DRY:
                item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is False"))
    if SAMPLED:
        first = {_function(item): item for item in reversed(items)}
        last = {_function(item): item for item in items}
        kept = {id(item) for item in (*first.values(), *last.values())}
        items[:] = [item for item in items if id(item) in kept]


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[", 1)[0]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _exact_float32() -> Iterator[None]:
    """An engine chooses kernels for the whole process: TF32, compiled chains, a grouped product. Here every test begins
    without them."""
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")
    compile_chains(None)
    set_grouped_product(torch_product)


@pytest.fixture(scope="session")
def one_rank(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of this process alone, for the engines that want one."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    # The plain engine on the CPU asks the same group.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
