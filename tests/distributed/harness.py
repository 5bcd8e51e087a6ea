"""Runs a Python function on several gloo ranks and returns what each of them returned.

Importing torch and DeepSpeed takes 4 to 6 seconds a process, most of a small test. One server process imports
them once and forks the ranks of every run, so a run costs what it computes. Run as a script, this file is that server:
it reads one job a line and answers with the exit codes of the job's ranks.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class RankContext:
    """Which rank runs, of how many, and a folder that all ranks of the run share."""

    rank: int
    world_size: int
    folder: Path


class Ranks:
    """The server and its runs; `folder` keeps results and output of every run."""

    def __init__(self, folder: Path, *modules: str) -> None:
        """Start the server; it imports `modules` (of tests/distributed) before it forks."""
        here = Path(__file__).parent
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]),
        }
        self._folder, self._runs = folder, 0
        self._log = folder / "server.log"
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                [sys.executable, __file__, *modules],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip

    def run(self, function: Callable[..., Any], ranks: int, *, deadline: float = 120.0, **arguments: Any) -> list[Any]:
        """`function(RankContext, **arguments)` on every rank of a fresh process group; results in rank order.

        Args:
            function: a function of an importable module of tests/distributed.
            arguments: values that JSON can hold; results are what torch.load reads with weights_only.

        Raises:
            AssertionError: a rank failed or the deadline passed; with the output of all ranks.
        """
        import torch

        self._runs += 1
        folder = self._folder / f"run{self._runs}"
        folder.mkdir()
        job = {
            "module": function.__module__,
            "function": function.__name__,
            "ranks": ranks,
            "deadline": deadline,
            "folder": str(folder),
            "arguments": arguments,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], deadline + 60.0)
        answer = self._server.stdout.readline() if ready else ""
        if not answer:
            raise AssertionError(f"the server of ranks does not answer:\n{self._log.read_text()}")
        codes = json.loads(answer)
        if any(codes):
            output = "\n".join(f"--- rank {rank}\n{(folder / f'{rank}.log').read_text()}" for rank in range(ranks))
            raise AssertionError(f"{function.__name__}: exit codes {codes} (deadline {deadline} s)\n{output}")
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks)]

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)


def _serve(modules: list[str]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # What imports and ranks print must not be taken for an answer.
    # What is imported stays: every collection of garbage in a rank would walk through all of it, 0.6 s at a time.
    gc.disable()
    for module in modules:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        answers.write(json.dumps(_run(json.loads(line))) + "\n")
        answers.flush()


def _run(job: dict[str, Any]) -> list[int]:
    """Fork the ranks and wait for them; a failed rank, or the deadline, ends the others."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    running: dict[int, int] = {}
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            os._exit(_be_rank(job, rank, port))
        running[pid] = rank
    codes = [0] * job["ranks"]
    end = time.monotonic() + job["deadline"]
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        if running and (any(codes) or time.monotonic() > end):
            for pid, rank in running.items():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                codes[rank] = -signal.SIGKILL
            break
        time.sleep(_POLL_SECONDS)
    return codes


def _be_rank(job: dict[str, Any], rank: int, port: int) -> int:
    folder = Path(job["folder"])
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Where ranks share a core, a thread of gloo that wakes up interrupts the one that holds its lock, and asks for it
    # again and again. In this class it waits for its turn: a tenth of the ranks' processor time.
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    ranks = job["ranks"]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        LOCAL_SIZE=str(ranks),  # Or DeepSpeed starts numactl to count devices, a hundred times a test.
    )  # fmt: skip
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        function = getattr(importlib.import_module(job["module"]), job["function"])
        result = function(RankContext(rank, ranks, folder), **job["arguments"])
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.save(result, folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1:])
