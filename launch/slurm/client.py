"""SLURM's commands, as far as a launch needs them: each with a deadline, each refusal a sentence."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rxt_dist.errors import ConfigError, UnavailableError

_SECONDS = 60.0
# A controller that restarts, or is busy, is back within minutes.
_PATIENCE_SECONDS, _PAUSE_SECONDS = 300.0, 5.0
_AWAY = re.compile(r"[Uu]nable to contact|[Cc]onnection refused|timed out|[Ss]ocket|temporarily|[Cc]ommunication", re.A)

# States of jobs that wait, and of those that have nodes.
WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT")
ACTIVE = (*WAITING, "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "STAGE_OUT", "SIGNALING")


@dataclass(frozen=True)
class JobState:
    """A job as the queue shows it: its state (RUNNING, PENDING, ...), why it waits, its nodes, when it started or is
    expected to."""

    state: str
    reason: str = ""
    nodes: str = ""
    started: str = ""


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one kind in a partition, by `sinfo`."""

    partition: str
    default: bool
    seconds: float
    nodes: int
    cpus: int
    gpus: int


class SlurmError(UnavailableError):
    """SLURM refused, or did not answer."""


def there() -> bool:
    """Whether SLURM's commands can be called here."""
    return shutil.which("sbatch") is not None


def call(*command: str, patience: float = 0.0) -> str:
    """Run a command of SLURM; its output.

    It ignores TERM, which a requeue sends to all processes of the job, also to the command that asked for it.

    Args:
        patience: for how many seconds to try again where the controller is away.

    Raises:
        SlurmError: it refused, or the controller stayed away.
    """
    end = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False, preexec_fn=_ignore_term
            )
            said = (done.stderr or done.stdout).strip()
            if done.returncode == 0:
                return done.stdout
        except FileNotFoundError as error:
            raise SlurmError(f"{command[0]} is not there: load SLURM's module, or log in to the cluster.") from error
        except subprocess.TimeoutExpired:
            said = f"timed out after {_SECONDS:g} s"
        if time.monotonic() >= end or not _AWAY.search(said):
            raise SlurmError(f"`{' '.join(command[:4])}` was refused: {said}")
        time.sleep(_PAUSE_SECONDS)


def _ignore_term() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def submit(script: str, *options: str) -> str:
    """Submit a script; the id of its job."""
    return call("sbatch", "--parsable", *options, script).strip().split(";")[0]


def would_start(script: str, *options: str) -> str:
    """What SLURM says about when a script could start.

    Raises:
        ConfigError: never, with what it asks for.
    """
    command = ["sbatch", "--test-only", *options, script]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"sbatch did not answer within {_SECONDS:g} s.") from error
    said = re.sub(r"^sbatch: (error: )?", "", (done.stderr or done.stdout).strip(), flags=re.M)
    if done.returncode:
        raise ConfigError(
            f"SLURM would never start this job: {said}. `sinfo` shows partitions, nodes and limits, and the script is "
            f"what asks for more than they have."
        )
    return said


def job_state(job: str, patience: float = 0.0) -> JobState | None:
    """A job that the queue still knows; None: it does not. Of an array, that of its first job."""
    try:
        answer = call("squeue", "-h", "-a", "-j", job, "-o", "%T|%r|%N|%S", patience=patience)
    except SlurmError as error:
        if "nvalid job id" in str(error):
            return None
        raise
    lines = answer.strip().splitlines()
    return JobState(*lines[0].split("|")) if lines else None


def last_state(job: str) -> str | None:
    """How a job ended, where SLURM keeps accounts or still remembers; None: nobody knows."""
    for command in (("sacct", "-n", "-X", "-P", "-j", job, "-o", "State"), ("scontrol", "-o", "show", "job", job)):
        try:
            answer = call(*command)
        except SlurmError:
            continue
        found = re.search(r"JobState=(\w+)", answer) if command[0] == "scontrol" else re.match(r"\s*(\w+)", answer)
        if found:
            return found[1]
    return None


def node_states(hosts: Sequence[str]) -> dict[str, str]:
    """State of each node (idle, allocated, down*, ...), as far as SLURM says."""
    try:
        answer = call("sinfo", "-h", "-N", "-n", ",".join(hosts), "-o", "%N|%T")
    except SlurmError:
        return {}
    return dict(line.split("|", 1) for line in answer.split() if "|" in line)


def host_names(nodelist: str) -> list[str]:
    """The hosts of a node list such as `gpu[007-012]`."""
    return call("scontrol", "show", "hostnames", nodelist, patience=_PATIENCE_SECONDS).split()


def binds_cpus() -> bool:
    """Whether srun can bind tasks to CPUs here."""
    try:
        return bool(re.search(r"^TaskPlugin\s*=.*(affinity|cgroup)", call("scontrol", "show", "config"), re.M))
    except SlurmError:
        return True


def requeue(job: str) -> None:
    """Put a job back into the queue, which ends its processes.

    Raises:
        SlurmError: the site forbids it, or the job is not what can be requeued.
    """
    call("scontrol", "requeue", job, patience=_PATIENCE_SECONDS)


def exclude(job: str, hosts: Sequence[str]) -> None:
    """Keep a waiting job off these nodes."""
    call("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(hosts)}", patience=_PATIENCE_SECONDS)


def cancel(job: str) -> None:
    """Cancel a job."""
    call("scancel", job)


def node_kinds() -> list[NodeKind]:
    """What the partitions consist of."""
    kinds = []
    for line in call("sinfo", "-h", "-o", "%P|%l|%D|%c|%G").splitlines():
        name, limit, nodes, cpus, gres = line.strip().split("|")
        found = re.search(r"gpu(?::[A-Za-z][\w.-]*)?:(\d+)", gres)
        kinds.append(
            NodeKind(
                name.rstrip("*"),
                name.endswith("*"),
                _limit_seconds(limit),
                int(nodes),
                int(re.sub(r"\D", "", cpus) or 0),
                int(found[1]) if found else 0,
            )
        )
    return kinds


def _limit_seconds(text: str) -> float:
    """SLURM's `1-00:00:00`, `30:00` or `infinite` in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
