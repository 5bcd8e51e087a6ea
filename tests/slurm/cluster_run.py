"""A tiny run that is launched on the rack, and what a test wants to know of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from rack import Rack
from training_run import TinyRun

from rxt_dist.files import write_atomic

ROOT = Path(__file__).parents[2]
# Two ranks on two nodes, on CPUs, with the nodes' GPUs as what SLURM counts.
TWO_NODES = ("--nodes=2", "--gpus-per-node=1", "--cpus-per-task=2", "--time=20m")
# What stands in a person's shell and must not reach their jobs: limits that sbatch would prefer to the script's, habits
# of srun, a folder that only the login machine has.
SHELL = (
    "SBATCH_TIMELIMIT=1", "SBATCH_NO_REQUEUE=1", "SBATCH_WAIT=1", "SLURM_LABELIO=1", "SLURM_DISTRIBUTION=cyclic",
    "SLURM_GPUS_PER_TASK=1", "TMPDIR=/no/such/folder",
)  # fmt: skip
# Has no rights of its own, and no home.
OTHER_USER = "nobody"
ON_CPUS = ("--env=DS_ACCELERATOR=cpu", "--env=OMP_NUM_THREADS=1")


def on_login_machine(rack: Rack, *arguments: str, expected: int = 0, timeout: float = 120, user: str = "root") -> str:
    """`rxt-dist` on the login machine; its output."""
    environment = ["env", f"PYTHONPATH={ROOT}", "OMP_NUM_THREADS=1", *SHELL]
    command = [*become(user), *environment, sys.executable, "-m", "rxt_dist", *arguments]
    done = rack.on_login(*command, check=False, timeout=timeout)
    assert done.returncode == expected, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def become(user: str) -> list[str]:
    """What runs a command as another user."""
    return [] if user == "root" else ["setpriv", f"--reuid={user}", "--regid=65534", "--clear-groups"]


def on_this_machine(*arguments: str) -> None:
    """`rxt-dist` without the rack."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "rxt_dist", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"


class Launched:
    """A run that was submitted on the rack: its files, its job, and its processes."""

    def __init__(self, rack: Rack, directory: Path) -> None:
        self.rack, self.directory, self.name = rack, directory, directory.name

    # -- what stands in its files --------------------------------------------------------------------------------------

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.directory / name
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]

    def ledger(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in self.lines("job/ledger.jsonl") if line["kind"] == kind]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.lines("events.jsonl") if event["kind"] == kind]

    def state(self) -> str:
        """What its supervisor said last."""
        path = self.directory / "job/status.json"
        return str(json.loads(path.read_bytes())["state"]) if path.exists() else ""

    def curve(self) -> list[tuple[float, ...]]:
        fields = ("step", "ar_loss", "mlm_loss", "balance_loss", "z_loss", "grad_norm", "lr", "ar_accuracy")
        return [tuple(line[field] for field in fields) for line in self.lines("metrics.jsonl") if "ar_loss" in line]

    def step(self) -> int:
        return max((line["step"] for line in self.lines("metrics.jsonl") if "ar_loss" in line), default=0)

    def output(self) -> str:
        """What its jobs have printed."""
        return "\n".join(path.read_text(errors="replace") for path in self.directory.glob("job/*/slurm-*.out"))

    # -- what the queue says -------------------------------------------------------------------------------------------

    @property
    def job(self) -> str:
        return str(self.ledger("job")[-1]["job"])

    def queue(self, what: str = "%T") -> str:
        return self.rack.on_login("squeue", "-h", "-j", self.job, "-o", what, check=False).stdout.strip()

    def detail(self, name: str) -> str:
        """A field of `scontrol show job`."""
        shown = self.rack.on_login("scontrol", "-o", "show", "job", self.job).stdout
        return next(word.partition("=")[2] for word in shown.split() if word.startswith(f"{name}="))

    def signal(self, name: str) -> None:
        """What SLURM sends before a time limit: to the job's own process alone."""
        self.rack.on_login("scancel", "--batch", f"--signal={name}", self.job)

    def supervisor(self) -> list[int]:
        """Its supervisor on the first node of its job, as that node numbers it."""
        found = self.rack.on(self.nodes()[0], "pgrep", "-f", f"slurm.supervisor {self.directory}/", check=False)
        return [int(pid) for pid in found.stdout.split()]

    def nodes(self) -> list[str]:
        """Of the life that began last."""
        return list(self.ledger("life")[-1]["hosts"])

    def rank_processes(self, node: str) -> list[int]:
        """Processes of its ranks on a node, as that node numbers them."""
        found = self.rack.on(node, "pgrep", "-f", f"slurm.task rank .*{self.directory}/", check=False)
        return [int(pid) for pid in found.stdout.split()]

    # -- waiting -------------------------------------------------------------------------------------------------------

    def wait(self, what: str, until: Callable[[], object], seconds: float = 90) -> None:
        end = time.monotonic() + seconds
        while not until():
            if time.monotonic() > end:
                told = "\n".join(str(line) for line in self.lines("job/ledger.jsonl"))
                queue = self.rack.on_login("squeue", "-o", "%i %j %T %r %N", check=False).stdout
                raise AssertionError(
                    f"{self.name}: {what} not within {seconds} s\n{queue}\n{told}\n{self.output()[-6000:]}"
                )
            time.sleep(0.1)

    def wait_for_step(self, step: int, seconds: float = 90) -> None:
        self.wait(f"step {step}", lambda: self.step() >= step, seconds)

    def wait_for_end(self, seconds: float = 120) -> None:
        """Until the job has left the queue for good."""
        gone = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        self.wait("end", lambda: self.detail("JobState") in gone, seconds)

    def require_finished_as(self, undisturbed: list[tuple[float, ...]]) -> None:
        """It is finished, with the numbers of a run that nothing has happened to."""
        assert (self.directory / "finished.json").exists(), self.output()[-4000:]
        own = self.curve()
        assert [line[0] for line in own] == [line[0] for line in undisturbed]
        assert own == undisturbed
        assert self.detail("JobState") == "COMPLETED"
        assert self.state() == "finished"


class ClusterRun(Launched):
    """The run `name` in the rack's folder: DeepSpeed and ZeRO-3, with the experts whole on every node."""

    def __init__(self, rack: Rack, shards: Path, name: str, steps: int) -> None:
        folder = rack.folder / name
        super().__init__(rack, folder / "runs" / name)
        folder.mkdir(exist_ok=True)
        self.tiny = TinyRun(folder, shards, steps)
        content = self.tiny.content()
        content |= {
            "name": name,
            "train": content["train"] | {"micro_batch_rows": 4},
            "parallel": {"engine": "deepspeed", "zero": 3, "expert_parallel": 1},
            "checkpoint": {"every_tokens": 4 * 512, "keep": 3},
        }
        self.file = folder / "run.yaml"
        write_atomic(self.file, yaml.safe_dump(content))

    def rxt(self, *arguments: str, expected: int = 0, user: str = "root") -> str:
        """`rxt-dist` on the login machine; its output."""
        return on_login_machine(self.rack, *arguments, expected=expected, user=user)

    def launch(self, *options: str, user: str = "root") -> str:
        """Submit it to two nodes; the id of its job."""
        self.rxt("launch", "slurm", str(self.file), *TWO_NODES, *ON_CPUS, *options, user=user)
        return self.job

    def train_locally(self) -> None:
        """The same run on as many ranks of this machine."""
        on_this_machine("launch", "local", str(self.file), "--ranks", "2")
