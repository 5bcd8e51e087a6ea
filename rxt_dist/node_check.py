"""Whether a node can train: asked of every node of a job before its ranks start, `python -m rxt_dist.node_check`.

It answers by lines of its output: what is wrong by itself, then whether it has computed with the others. Files would be
seen late on network disks. A node that is slow, full or has lost a GPU costs a run of many nodes hours; this costs
seconds.
"""

from __future__ import annotations

import faulthandler
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rxt_dist.engine.rendezvous import join_ranks
from rxt_dist.leaving import native_threads_remain, run_program

# How a line begins that is an answer.
ANSWER = "rxt-node "
_SHM_PER_RANK = 16 * 2**20
_DISK = 100 * 2**20
_MEMORY_PER_RANK = 2**30
_FREE_GPU_SHARE = 0.8
_SIZE, _CPU_SIZE = 4096, 256
_TIMEOUT = timedelta(seconds=60)


def check(host: str, ranks: int, run: Path) -> bool:
    """Look at this node, then compute with the others. Returns whether all is well.

    Args:
        host: the node's name in answers. ranks: of this node. run: the run directory.
    """
    started = time.monotonic()
    problems = list(problems_of_node(ranks, run))
    answer = {"host": host, "problems": problems, "together": False, "seconds": round(time.monotonic() - started, 2)}
    _tell(answer)
    if problems:
        return False
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    problem = _reduce_with_others(device)
    total = round(time.monotonic() - started, 2)
    answer |= {"together": problem is None, "problem_together": problem, "seconds": total}
    _tell(answer)
    return problem is None


def _tell(answer: dict[str, Any]) -> None:
    # One write: other nodes' lines come through the same pipe.
    sys.stdout.write(f"{ANSWER}{json.dumps(answer)}\n")
    sys.stdout.flush()


def problems_of_node(ranks: int, run: Path) -> Iterator[str]:
    """What is wrong with this node, a sentence each."""
    yield from _gpu_problems(ranks)
    places = [(Path("/dev/shm"), _SHM_PER_RANK * ranks)]
    try:
        places.append((Path(tempfile.gettempdir()), _DISK))
    except OSError:
        yield "no temporary folder can be written to (TMPDIR, /tmp, /var/tmp)"
    for place, needed in [*places, (run, _DISK)]:
        try:
            free = shutil.disk_usage(place).free
        except OSError as error:
            yield f"{place} cannot be seen ({error.strerror})"
            continue
        if free < needed:
            yield f"{place} has {free / 2**20:.0f} MB free and {needed / 2**20:.0f} MB are needed"
    if not os.access(run, os.W_OK):
        yield f"{run} cannot be written to"
    available = _available_memory()
    if available is not None and available < _MEMORY_PER_RANK * ranks:
        yield f"{available / 2**30:.1f} GB of memory are free, and {ranks} ranks need a GB each at least"
    for device in _devices_that_compute_wrong():
        yield f"a matrix product came out wrong on {device}"


def _gpu_problems(ranks: int) -> Iterator[str]:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None and len([name for name in listed.split(",") if name]) < ranks:
        yield f"SLURM has given this node the GPUs '{listed}', and {ranks} are needed"
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return
    found = torch.cuda.device_count()
    if found < ranks:
        yield f"the driver shows {found} GPUs, and {ranks} are needed (DS_ACCELERATOR=cpu trains without)"
        return
    for number in range(ranks):
        free, total = torch.cuda.mem_get_info(number)
        if free < _FREE_GPU_SHARE * total:
            yield f"GPU {number} has {free / 1e9:.1f} of {total / 1e9:.1f} GB free: another process uses it"


def _devices_that_compute_wrong() -> Iterator[torch.device]:
    """A short product on each device, twice: finite numbers, and the same ones both times."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    devices = [torch.device("cuda", number) for number in range(gpus)] or [torch.device("cpu")]
    size, kind = (_SIZE, torch.bfloat16) if gpus else (_CPU_SIZE, torch.float32)
    values = torch.randn(size, size, generator=torch.Generator().manual_seed(1))
    for device in devices:
        left = values.to(device, kind)
        first, second = left @ left, left @ left
        if not (bool(torch.isfinite(first).all()) and torch.equal(first, second)):
            yield device


def _reduce_with_others(device: torch.device) -> str | None:
    """An all-reduce of all nodes; what went wrong with it, or None."""
    nodes = int(os.environ["WORLD_SIZE"])
    try:
        join_ranks(device, _TIMEOUT)
        ones = torch.ones(2**20, device=device)
        dist.all_reduce(ones)
        wrong = float(ones.sum()) != nodes * 2**20
        dist.destroy_process_group()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return "an all-reduce came out wrong" if wrong else None


def _available_memory() -> int | None:
    """Bytes that processes can still have; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in values else None


if __name__ == "__main__":
    native_threads_remain()
    faulthandler.enable()
    run_program(lambda: sys.exit(not check(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))))
