"""SLURM's commands, as far as a launch needs them: each with a deadline, each refusal a sentence."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rxt_dist.errors import ConfigError, UnavailableError

_SECONDS = 60.0
# A controller that restarts, or is busy, is back within minutes.
_PATIENCE_SECONDS, _PAUSE_SECONDS = 300.0, 5.0
_AWAY = re.compile(
    r"unable to contact|connection refused|timed out|socket|temporarily|communication|zero bytes|standby|munge",
    re.A | re.I,
)
# Variables that sbatch prefers to an option in a script, where the name does not follow from the option's.
_VARIABLES = {
    "array": ("ARRAY_INX",),
    "time": ("TIMELIMIT",),
    "mem": ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU"),
    "requeue": ("NO_REQUEUE",),
    "no-requeue": ("REQUEUE",),
    "gpus-per-node": ("GPUS", "GPUS_PER_TASK", "GRES"),
    "gres": ("GPUS", "GPUS_PER_TASK", "GPUS_PER_NODE"),
}

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


def call(*command: str, patience: float = 0.0, environment: Mapping[str, str] | None = None) -> str:
    """Run a command of SLURM; its output.

    It ignores TERM, which a requeue sends to all processes of the job, also to the command that asked for it.

    Args:
        patience: for how many seconds to try again where the controller is away.
        environment: None: that of this process.

    Raises:
        SlurmError: it refused, or the controller stayed away.
    """
    end = time.monotonic() + patience
    while True:
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=False, preexec_fn=_ignore_term,
                env=environment,
            )  # fmt: skip
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
    said = call("sbatch", "--parsable", *options, script, environment=_without_overrides(script))
    # Some sites greet before it.
    found = re.findall(r"^(\d+)(?:;\S*)?\s*$", said, re.M)
    if not found:
        raise SlurmError(f"sbatch did not say which job it made: {said.strip()[:200]!r}. `squeue --me` shows it.")
    return str(found[-1])


def _without_overrides(script: str) -> dict[str, str]:
    """The environment without the variables of a person that sbatch would prefer to what the script says, and without
    the one that lets it wait for the end of the job."""
    stated: list[str] = []
    with suppress(OSError):
        stated = re.findall(r"^#SBATCH --([a-z-]+)", Path(script).read_text(encoding="utf-8"), re.M)
    names = {"SBATCH_WAIT"} | {f"SBATCH_{option.upper().replace('-', '_')}" for option in stated}
    names |= {f"SBATCH_{name}" for option in stated for name in _VARIABLES.get(option, ())}
    return {name: value for name, value in os.environ.items() if name not in names}


def would_start(script: str, *options: str) -> str:
    """What SLURM says about when a script could start.

    Raises:
        ConfigError: never, with what it asks for.
        SlurmError: it does not answer.
    """
    command = ["sbatch", "--test-only", *options, script]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, env=_without_overrides(script)
        )
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"sbatch did not answer within {_SECONDS:g} s.") from error
    said = re.sub(r"^sbatch: (error: )?", "", (done.stderr or done.stdout).strip(), flags=re.M)
    if done.returncode and _AWAY.search(said):
        raise SlurmError(f"sbatch cannot say whether this job would start: {said}")
    if done.returncode:
        raise ConfigError(
            f"SLURM would never start this job: {said}. `sinfo` shows partitions, nodes and limits, and the script is "
            f"what asks for more than they have."
        )
    return said


def job_state(job: str, patience: float = 0.0) -> JobState | None:
    """A job that the queue still knows; None: it does not. Of an array, one of its jobs that has not ended, if any."""
    try:
        answer = call("squeue", "-h", "-a", "-j", job, "-o", "%T|%r|%N|%S", patience=patience)
    except SlurmError as error:
        if "nvalid job id" in str(error):
            return None
        raise
    states = [JobState(*line.split("|")) for line in answer.strip().splitlines()]
    return next((state for state in states if state.state in ACTIVE), states[0] if states else None)


def active_state(job: str) -> str | None:
    """The state of a job that waits or has nodes; None: it has ended, or the queue does not know it."""
    state = job_state(job)
    return state.state if state is not None and state.state in ACTIVE else None


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
    """What the partitions consist of, also those that are hidden; a line that says something else is left out."""
    kinds = []
    for line in call("sinfo", "-h", "-a", "-o", "%P|%l|%D|%c|%G").splitlines():
        fields = line.strip().split("|")
        if len(fields) != 5 or not fields[2].isdigit():
            continue
        name, limit, nodes, cpus, gres = fields
        least = int(re.sub(r"\D", "", cpus) or 0)
        kinds.append(
            NodeKind(name.rstrip("*"), name.endswith("*"), _limit_seconds(limit), int(nodes), least, gpus_of(gres))
        )
    return kinds


def gpus_of(gres: str) -> int:
    """GPUs of a list of resources such as `gpu:a100:8(S:0-1),nvme:1`; a type may be a number, as in `gpu:3090:8`."""
    items = [item.strip().split(":") for item in re.sub(r"\([^)]*\)", "", gres).split(",")]
    gpus = [item for item in items if item[0] == "gpu"]
    return sum(int(item[-1]) if item[-1].isdigit() else 1 for item in gpus)


def _limit_seconds(text: str) -> float:
    """SLURM's `1-00:00:00`, `30:00` or `infinite` in seconds."""
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if found is None:
        return float("inf")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
