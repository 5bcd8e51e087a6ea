"""Two jobs at one time on one node: neither sees the other's ports, caches and shared memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
from cluster_run import OTHER_USER, ROOT, ClusterRun, become
from rack import Rack

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]
NODE = "gpu01"


@contextmanager
def open_to_all(rack: Rack, run: ClusterRun) -> Iterator[None]:
    """Let another user run the program on the login machine and the node, also where it lies in root's home, which only
    root may enter: there another folder takes that one's place for a while."""
    home = Path.home()
    hidden = {str(path) for path in (sys.base_prefix, sys.prefix, ROOT) if Path(path).is_relative_to(home)}
    cover = [f"exec {number}<{path}" for number, path in enumerate(hidden, 5)] + [
        f"mount -t tmpfs -o mode=755 tmpfs {home}"
    ]
    for number, path in enumerate(hidden, 5):
        cover += [f"mkdir -p {path}", f"mount -c --rbind /proc/self/fd/{number} {path}"]
    rack.folder.chmod(0o711)
    for path in (run.tiny.folder, run.file):
        os.chown(path, 65534, 65534)
    for machine in (None, NODE):
        rack.run(machine, ["sh", "-ec", "\n".join(cover)], check=True, timeout=20)
    try:
        rack.on_login(*become(OTHER_USER), sys.executable, "-c", "import torch")
        yield
    finally:
        for machine in (None, NODE):
            rack.run(machine, ["umount", "-lR", str(home)], check=True, timeout=20)


def port_of(run: ClusterRun) -> str:
    """Where its ranks meet."""
    environment = run.rack.on(NODE, "cat", f"/proc/{run.rank_processes(NODE)[0]}/environ").stdout
    return next(entry for entry in environment.split("\0") if entry.startswith("MASTER_PORT="))


def shared_memory(rack: Rack) -> str:
    return rack.on(NODE, "find", "/dev/shm", "-mindepth", "1").stdout


@pytest.mark.parametrize("neighbour", ["root", OTHER_USER])
def test_two_jobs_on_one_node_do_not_meet(new_run: Callable[..., ClusterRun], rack: Rack, neighbour: str) -> None:
    own, other = (new_run(f"{name}-{neighbour}", 24) for name in ("own", "other"))
    before = shared_memory(rack)
    with nullcontext() if neighbour == "root" else open_to_all(rack, other):
        for run, user in ((own, "root"), (other, neighbour)):
            # Held, so that both begin at one moment.
            options = ("--nodes=1", "--gpus-per-node=2", "--no-preflight", f"--sbatch=--nodelist={NODE}")
            run.launch(*options, "--sbatch=--hold", user=user)
        rack.on_login("scontrol", "release", f"{own.job},{other.job}")
        for run in (own, other):
            run.wait("ready", lambda run=run: run.events("ready"))
        ports = {port_of(run) for run in (own, other)}
        caches = rack.on(NODE, "find", "/tmp", "-maxdepth", "1", "-name", "rxt-*", "-printf", "%f %u %m\n").stdout
        for run in (own, other):
            run.wait_for_end(180)
    (life,), (other_life,) = own.ledger("life"), other.ledger("life")
    assert max(life["time"], other_life["time"]) < min(run.ledger("end")[0]["time"] for run in (own, other))
    assert [run.state() for run in (own, other)] == ["finished", "finished"]
    assert own.curve() == other.curve()
    assert len(ports) == 2
    assert f"rxt-0-{own.job} root 700" in caches
    assert f"rxt-{0 if neighbour == 'root' else 65534}-{other.job} {neighbour} 700" in caches
    assert shared_memory(rack) == before
