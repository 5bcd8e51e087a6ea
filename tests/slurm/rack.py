"""A SLURM cluster of several nodes on one machine: real daemons, each node with a network, processes, host name, /tmp
and /dev/shm of its own.

    python tests/slurm/rack.py up FOLDER [--nodes 4]     then `exec FOLDER -- squeue`, `down FOLDER`
    python tests/slurm/rack.py cut|heal|kill|boot FOLDER NODE

Every process of it lives in one pid namespace, whose first process is the login machine: when that ends, the kernel
ends all others and takes networks and mounts down with them. FOLDER is what the nodes share.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "nsenter")
_SPACES = ("--mount", "--uts", "--ipc", "--net", "--pid")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_UP_SECONDS = 60.0


def missing() -> str | None:
    """Why no rack can stand here; None: one can."""
    if os.geteuid():
        return "network and process namespaces need root"
    absent = [name for name in NEEDED if shutil.which(name, path=_PATH) is None]
    if absent:
        return f"{', '.join(absent)} not installed: `make test-slurm` installs SLURM"
    trial = "ip link add br0 type bridge && ip link add v0 type veth peer name v1 && mount -t tmpfs tmpfs /mnt"
    done = subprocess.run(
        ["unshare", *_SPACES, "--fork", "sh", "-c", trial], capture_output=True, text=True, check=False
    )
    return f"no namespaces, bridges or mounts here: {done.stderr.strip()}" if done.returncode else None


@dataclass(frozen=True)
class Shape:
    """What the nodes are said to have; no more of it exists than this machine has."""

    nodes: int = 4
    gpus: int = 4
    cpus: int = 16
    memory_mb: int = 4000
    subnet: str = "10.87.0"

    def names(self) -> list[str]:
        return [f"gpu{number:02d}" for number in range(1, self.nodes + 1)]

    def address(self, node: str) -> str:
        return f"{self.subnet}.{10 + int(node[3:])}"


class Rack:
    """A rack in `folder`, from outside."""

    def __init__(self, folder: Path, shape: Shape | None = None) -> None:
        self.folder = folder
        if shape is None:
            shape = Shape(**json.loads((folder / "shape.json").read_text()))
        self.shape = shape

    @property
    def conf(self) -> Path:
        return self.folder / "slurm.conf"

    def up(self, lingers: bool = False) -> None:
        """Start it and wait until all nodes are idle.

        Args:
            lingers: it stays when this process ends; else it ends with it, however that ends.
        """
        for name in ("log", "run", "state", "dev", "pids"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "shape.json").write_text(json.dumps(asdict(self.shape)))
        write_settings(self)
        with open(self.folder / "log/login.out", "wb") as log:
            unshare = subprocess.Popen(
                ["unshare", *_SPACES, "--fork", "--kill-child=KILL", "--mount-proc", *own("login", self.folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=clean_environment(self),
                preexec_fn=None if lingers else _end_with_parent,
            )  # fmt: skip
        (self.folder / "pids/unshare").write_text(str(unshare.pid))
        end = time.monotonic() + _UP_SECONDS
        while not self._all_idle():
            if time.monotonic() > end or unshare.poll() is not None:
                self.down()
                raise RuntimeError(f"the rack does not come up:\n{self.logs()}")
            time.sleep(0.1)

    def _all_idle(self) -> bool:
        try:
            states = self.on_login("sinfo", "-h", "-N", "-p", "main", "-o", "%T", check=False).stdout.split()
        except (OSError, ValueError):
            return False
        return states == ["idle"] * self.shape.nodes

    def logs(self) -> str:
        """The ends of all log files."""
        texts = []
        for path in sorted((self.folder / "log").iterdir()):
            lines = path.read_text(errors="replace").splitlines()[-15:]
            texts.append("\n".join([f"== {path.name}", *lines]))
        return "\n".join(texts)

    def down(self) -> None:
        """End it: one process, and with it all others."""
        pid = int((self.folder / "pids/unshare").read_text())
        for victim in (_child(pid), pid):
            if victim:
                try:
                    os.kill(victim, signal.SIGKILL)
                except ProcessLookupError:
                    continue
        end = time.monotonic() + 20
        while Path(f"/proc/{pid}/exe").exists() and time.monotonic() < end:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            time.sleep(0.02)

    def enter(self, node: str | None) -> list[str]:
        """The command that brings another one onto a machine of the rack; None: the login machine."""
        pid = _child(int((self.folder / "pids/unshare").read_text()))
        if pid is None:
            raise ValueError("the rack is not up")
        spaces = [*_SPACES, "-r"]
        command = ["nsenter", "-t", str(pid), *spaces, "--"]
        if node is not None:
            inner = (self.folder / f"pids/{node}").read_text()
            command += ["nsenter", "-t", inner, *spaces, "--"]
        return [*command, "env", "-C", os.getcwd(), f"SLURM_CONF={self.conf}"]

    def on_login(self, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on the login machine."""
        return self.run(None, command, check, timeout)

    def on(self, node: str, *command: str, check: bool = True, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on a node."""
        return self.run(node, command, check, timeout)

    def run(
        self, node: str | None, command: Sequence[str], check: bool, timeout: float
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.enter(node), *command], capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def cut(self, node: str) -> None:
        """Pull a node's network cable."""
        self.on_login("ip", "link", "set", f"v-{node}", "down")

    def heal(self, node: str) -> None:
        """Plug it in again."""
        self.on_login("ip", "link", "set", f"v-{node}", "up")

    def power_off(self, node: str) -> None:
        """All that runs on a node is gone at once; then SLURM is told, as it notices by itself only after a while."""
        self.on_login("kill", "-KILL", (self.folder / f"pids/{node}").read_text())

    def boot(self, node: str) -> None:
        """Switch a node on again."""
        self.on_login(*own("boot", self.folder, node))
        self.resume(node)

    def resume(self, node: str) -> None:
        """Make a node that SLURM took out ready for jobs, and wait until it is."""
        end = time.monotonic() + 30
        while self.node_state(node) not in ("idle", "mixed", "allocated"):
            assert time.monotonic() < end, f"{node} stays {self.node_state(node)}"
            self.on_login("scontrol", "update", f"nodename={node}", "state=resume", check=False)
            time.sleep(0.3)

    def node_state(self, node: str) -> str:
        return self.on_login("sinfo", "-h", "-n", node, "-p", "main", "-o", "%T").stdout.strip()


def clean_environment(rack: Rack) -> dict[str, str]:
    return {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": os.environ.get("HOME", "/root"), "SLURM_CONF": str(rack.conf)}


def own(role: str, folder: Path, *more: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), f"_{role}", str(folder), *more]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def _child(pid: int) -> int | None:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


# ---------------------------------------------------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------------------------------------------------

CONF = """\
ClusterName=rack
SlurmctldHost=login({subnet}.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/run/spool.%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# What containers and small machines lack: control groups, binding, an accounting data base.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
# Nodes are believed to have what stands here.
SlurmdParameters=config_overrides
GresTypes=gpu
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Quick, so that tests are: in production these are 30, 300, 60 and more.
KillWait=5
SlurmdTimeout=10
SlurmctldTimeout=30
MessageTimeout=10
InactiveLimit=0
MinJobAge=900
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1,nohold_on_prolog_fail
PriorityType=priority/basic
# Jobs in `urgent` take nodes from those in `main`, which get the user signal and ten seconds.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
MaxArraySize=1000
NodeName={nodes} NodeAddr={addresses} CPUs={cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory={memory} Gres=gpu:a100:{gpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=24:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=10
PartitionName=urgent Nodes=ALL MaxTime=24:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""


def write_settings(rack: Rack) -> None:
    folder, shape = rack.folder, rack.shape
    names, last = shape.names(), f"{shape.nodes:02d}"
    rack.conf.write_text(
        CONF.format(
            folder=folder, subnet=shape.subnet, nodes=f"gpu[01-{last}]", cpus=shape.cpus, memory=shape.memory_mb,
            gpus=shape.gpus, addresses=f"{shape.subnet}.[11-{10 + shape.nodes}]",
        )
    )  # fmt: skip
    # A GPU has to be a character device.
    for number in range(shape.gpus):
        (folder / f"dev/nvidia{number}").symlink_to("/dev/null")
    files = f"{folder}/dev/nvidia[0-{shape.gpus - 1}]"
    (folder / "gres.conf").write_text(f"AutoDetect=off\nNodeName=gpu[01-{last}] Name=gpu Type=a100 File={files}\n")
    lines = ["127.0.0.1 localhost", f"{shape.subnet}.1 login", *(f"{shape.address(name)} {name}" for name in names)]
    (folder / "hosts").write_text("\n".join(lines) + "\n")
    # Without a name server, a look-up of a name waits for one.
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)


# ---------------------------------------------------------------------------------------------------------------------
# The first processes of the machines
# ---------------------------------------------------------------------------------------------------------------------


def _sh(*command: str) -> None:
    subprocess.run(command, check=True)


def _machine(rack: Rack, name: str) -> None:
    _sh("mount", "--make-rprivate", "/")
    _sh("hostname", name)
    for file in ("hosts", "nsswitch.conf"):
        _sh("mount", "--bind", str(rack.folder / file), f"/etc/{file}")
    _sh("ip", "link", "set", "lo", "up")


def _reap_for_ever() -> None:
    """The first process of a namespace inherits all that lose their parent."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            time.sleep(0.2)


def login_main(rack: Rack) -> None:
    _machine(rack, "login")
    _sh("mount", "-t", "tmpfs", "tmpfs", "/run")
    Path("/run/netns").mkdir()
    _sh("ip", "link", "add", "br0", "type", "bridge")
    _sh("ip", "addr", "add", f"{rack.shape.subnet}.1/24", "dev", "br0")
    _sh("ip", "link", "set", "br0", "up")
    run, log = rack.folder / "run", rack.folder / "log"
    _sh(
        "munged", "--force", f"--key-file={rack.folder}/munge.key", f"--socket={run}/munge.socket",
        f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed",
    )  # fmt: skip
    subprocess.Popen(["slurmctld", "-D", "-c", "-f", str(rack.conf)], stdout=subprocess.DEVNULL, stderr=None)
    for node in rack.shape.names():
        boot(rack, node)
    _reap_for_ever()


def boot(rack: Rack, node: str) -> None:
    """Start a node, from the login machine."""
    if not Path(f"/run/netns/{node}").exists():
        _sh("ip", "netns", "add", node)
        _sh("ip", "link", "add", f"v-{node}", "type", "veth", "peer", "name", "eth0", "netns", node)
        _sh("ip", "link", "set", f"v-{node}", "master", "br0", "up")
        _sh("ip", "-n", node, "addr", "add", f"{rack.shape.address(node)}/24", "dev", "eth0")
        _sh("ip", "-n", node, "link", "set", "eth0", "up")
        _sh("ip", "-n", node, "route", "add", "default", "via", f"{rack.shape.subnet}.1")
    with open(rack.folder / f"log/{node}.out", "ab") as log:
        spaces = [space for space in _SPACES if space != "--net"]
        unshare = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{node}", "unshare", *spaces, "--fork", "--kill-child=KILL", "--mount-proc",
             *own("node", rack.folder, node)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    end = time.monotonic() + 10
    while (pid := _child(unshare.pid)) is None:
        assert time.monotonic() < end, f"{node} does not start"
        time.sleep(0.02)
    (rack.folder / f"pids/{node}").write_text(str(pid))


def node_main(rack: Rack, node: str) -> None:
    _machine(rack, node)
    _sh("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    # A /tmp of its own, in which only the rack's folder, and the code if it lies there, are those that all share.
    private = Path("/mnt")
    _sh("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(private))
    for folder in (rack.folder, Path(__file__).resolve().parents[2]):
        if folder.is_relative_to("/tmp"):
            shared = private / folder.relative_to("/tmp")
            shared.mkdir(parents=True)
            _sh("mount", "--rbind", str(folder), str(shared))
    _sh("mount", "--rbind", str(private), "/tmp")
    (rack.folder / f"run/spool.{node}").mkdir(exist_ok=True)
    subprocess.Popen(["slurmd", "-D", "-N", node, "-f", str(rack.conf)], stdout=subprocess.DEVNULL, stderr=None)
    _reap_for_ever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = ("up", "down", "exec", "cut", "heal", "kill", "boot", "_login", "_node", "_boot")
    parser.add_argument("verb", choices=verbs)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("rest", nargs="*")
    wanted = parser.parse_args()
    folder = wanted.folder.resolve()
    rack = Rack(folder, Shape(nodes=wanted.nodes) if wanted.verb == "up" else None)
    if wanted.verb == "up":
        rack.up(lingers=True)
        print(rack.on_login("sinfo").stdout)
    elif wanted.verb == "exec":
        on = wanted.rest.pop(0) if wanted.rest[0] in rack.shape.names() else None
        sys.exit(subprocess.run([*rack.enter(on), *wanted.rest], check=False).returncode)
    elif wanted.verb == "_login":
        login_main(rack)
    elif wanted.verb == "_node":
        node_main(rack, wanted.rest[0])
    elif wanted.verb == "_boot":
        boot(rack, wanted.rest[0])
    else:
        {"down": rack.down, "cut": rack.cut, "heal": rack.heal, "kill": rack.power_off, "boot": rack.boot}[wanted.verb](
            *wanted.rest
        )


if __name__ == "__main__":
    main()
