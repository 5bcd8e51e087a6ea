"""One task of a job step, `python -m launch.slurm.task ROLE LIFE_FOLDER LAUNCH.json`, on every node:

    rank    one rank of the training (a task for each GPU)
    agent   torchrun's agent of a node, which starts its ranks as `rank`
    check   the check of a node

The ranks of a step end together: SLURM kills the others of one that fails within moments, and what srun returns then
says nothing. So each leaves a file that says how it ended, and gives the others time to do so.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from pathlib import Path

from launch.ranks import words_file
from launch.slurm.job import Description
from launch.slurm.network import interface_towards
from rxt_dist.errors import ExitCode
from rxt_dist.files import write_json_atomic

# The launcher says in this variable which nodes there are.
HOSTS = "RXT_HOSTS"
_GRACE_SECONDS = 8.0
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Ends that all ranks have agreed on.
ORDERLY = (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.STOPPED)


def main() -> int:
    """Play the role that the command line names."""
    role, folder, description = sys.argv[1], Path(sys.argv[2]), Description.read(Path(sys.argv[3]))
    if role == "agent":
        _become_agent(folder, description)
    host = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
    if role == "check":
        os.environ.update(check_numbers(os.environ))
        arguments = [host, str(description.ranks_per_node), description.run]
    else:
        os.environ.update(rank_numbers(os.environ))
        arguments = [*description.command, *(description.once if os.environ.get("RXT_ONCE") else ())]
    set_surroundings(os.environ, host, description.cpus_per_task)
    if role == "check":
        return _be("rxt_dist.node_check", arguments)
    return _watched_rank(folder, host, arguments)


def rank_numbers(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables of a rank, which torchrun has set already or srun's say."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return {}
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": environ["SLURM_STEP_TASKS_PER_NODE"].split("(")[0],
    }


def check_numbers(environ: Mapping[str, str]) -> dict[str, str]:
    """torch's variables of a check, of which each node runs one."""
    return {"RANK": environ["SLURM_PROCID"], "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"], "LOCAL_RANK": "0"}


def set_surroundings(environ: MutableMapping[str, str], host: str, cpus: int) -> None:
    """What depends on the node: interfaces, threads, and caches that no other user or job shares.

    What the site or the person has set stays.
    """
    interface = interface_towards(host, environ.get(HOSTS, "").split(","))
    if interface is not None:
        environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        # NCCL takes a name for the beginning of one, unless told not to.
        environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")
    environ.setdefault("OMP_NUM_THREADS", str(cpus))
    caches = _private_folder(f"rxt-{os.getuid()}-{environ.get('SLURM_JOB_ID', '0')}")
    if caches is not None:
        environ.setdefault("TRITON_CACHE_DIR", f"{caches}/triton")
        environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{caches}/inductor")
        environ.setdefault("TORCH_EXTENSIONS_DIR", f"{caches}/extensions")


def _private_folder(name: str) -> Path | None:
    """A folder of this node that is this user's alone, of that name if nobody else has put something there: code is
    loaded from it. None: this node has no temporary folder, which its check says."""
    try:
        folder = Path(tempfile.gettempdir()) / name
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
            return folder
        return Path(tempfile.mkdtemp(prefix=f"{name}-"))
    except OSError:
        return None


def _become_agent(folder: Path, description: Description) -> None:
    environ = os.environ
    command = [
        sys.executable, "-m", "torch.distributed.run",
        f"--nnodes={environ['SLURM_STEP_NUM_NODES']}",
        f"--node-rank={environ['SLURM_PROCID']}",
        f"--nproc-per-node={description.ranks_per_node}",
        f"--master-addr={environ['MASTER_ADDR']}",
        f"--master-port={environ['MASTER_PORT']}",
        "--max-restarts=0",
        "-m", "launch.slurm.task", "rank", str(folder), sys.argv[3],
    ]  # fmt: skip
    os.execv(command[0], command)


def _be(module: str, arguments: list[str]) -> int:
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _watched_rank(folder: Path, host: str, arguments: list[str]) -> int:
    """Be a rank in a process of its own, and say how that ended, whatever ends it."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    words = words_file(folder, rank)
    os.environ["RXT_LAST_WORDS"] = str(words)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _follow(parent)
        if rank:
            _speak_into(folder / f"output-{rank}")
        sys.exit(_be("rxt_dist", arguments))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    write_json_atomic(folder / f"exit-{rank}", {"code": code, "host": host, "at": time.time()})
    if code in ORDERLY:
        return 0
    _wait_for_the_others(folder, ranks)
    return code if code > 0 else 128 - code


def _follow(parent: int) -> None:
    """Die with the process that says how this one ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)


def _speak_into(path: Path) -> None:
    """The first rank has the job's output for itself."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)


def _wait_for_the_others(folder: Path, ranks: int) -> None:
    end = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < end and not all((folder / f"exit-{rank}").exists() for rank in range(ranks)):
        time.sleep(_POLL_SECONDS)


def read_exits(folder: Path, ranks: int) -> dict[int, dict[str, object]]:
    """How ranks ended, by their numbers: code (negative: the signal), host, at (seconds since the epoch). Of one whose
    node is gone nothing is known."""
    found = {}
    for rank in range(ranks):
        try:
            found[rank] = json.loads((folder / f"exit-{rank}").read_bytes())
        except (OSError, ValueError):
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
