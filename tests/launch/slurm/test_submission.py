"""From a run file to a job, without SLURM: what is refused, what is written, what sbatch is told."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_run import SHARED_BY_TWO, TinyRun, build_shards

from launch.slurm import client, submit
from launch.slurm.client import JobState, NodeKind, SlurmError
from launch.slurm.freeze import freeze_code
from launch.slurm.job import JobFolder
from launch.slurm.ledger import Ledger
from launch.slurm.options import JobOptions, SlurmOptions
from launch.slurm.submit import Wish, check_partition, check_script, render, resubmit, signal_lead
from rxt_dist.config.load import load_run
from rxt_dist.errors import ConfigError
from rxt_dist.lives import file_identity
from rxt_dist.train.events import append_line
from rxt_dist.train.run_dir import code_version

ROOT = Path(__file__).parents[3]


class Cluster:
    """What sbatch was told, and what it answers."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, ...]] = []
        self.states: dict[str, str] = {}
        self.refusal: str | None = None

    def submit(self, script: str, *options: str) -> str:
        if self.refusal:
            raise SlurmError(self.refusal)
        self.submitted.append(options)
        return str(100 + len(self.submitted))

    def job_state(self, job: str, patience: float = 0.0) -> JobState | None:
        return JobState(self.states[job]) if job in self.states else None


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    monkeypatch.setattr(client, "submit", cluster.submit)
    monkeypatch.setattr(client, "job_state", cluster.job_state)
    monkeypatch.setattr(client, "there", lambda: True)
    monkeypatch.setattr(submit, "check_script", lambda text, options, nodes, gpus: None)
    monkeypatch.setattr(client, "binds_cpus", lambda: True)
    monkeypatch.setattr(submit, "_node_counts", lambda wish: [wish.options.nodes])
    return cluster


@pytest.fixture
def make_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Wish]:
    monkeypatch.chdir(tmp_path)
    tiny = TinyRun(tmp_path, tmp_path / "shards")

    def make(after: Path | None = None, **options: Any) -> Wish:
        options = {"nodes": 2, "gpus_per_node": 2} | options
        return Wish(load_run(tiny.file, []), SlurmOptions(**options), after)

    return make


def submitted(wish: Wish) -> list[str]:
    return submit.submit(wish, lambda text: None)


def test_where_slurm_is_not_nothing_is_submitted(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "there", lambda: False)
    with pytest.raises(ConfigError, match=r"sbatch\) are not here.*--dry-run"):
        submitted(make_wish())
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_writes_nothing(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path) -> None:
    text = render(make_wish(), print)
    assert "#SBATCH --nodes=2\n" in text
    assert "--signal=B:USR2@300" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_needs_no_cluster(
    make_wish: Callable[..., Wish], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> list[NodeKind]:
        raise SlurmError("sinfo: Unable to contact slurm controller")

    monkeypatch.setattr(submit, "check_script", check_script)
    monkeypatch.setattr(client, "node_kinds", away)
    told: list[str] = []
    assert "#SBATCH" in render(make_wish(), told.append)
    assert "Unable to contact" in told[0]


def test_a_submission_holds_all_that_its_job_needs(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    wish = make_wish()
    assert submitted(wish) == ["101"]
    folder = JobFolder(tmp_path / "runs/tiny")
    written = folder.submission(1)
    assert {path.name for path in written.iterdir()} == {"run.yaml", "submit.sbatch", "launch.json"}
    # From anywhere, the configuration leads to the same run.
    assert yaml.safe_load((written / "run.yaml").read_text())["output"] == str(tmp_path / "runs")
    described = folder.description()
    assert described is not None
    assert (described.jobs, described.node_counts, described.ranks_per_node) == (["101"], [2], 2)
    script = (written / "submit.sbatch").read_text()
    (code,) = folder.path.glob("code-*")
    assert f"export PYTHONPATH={code}" in script
    assert [line["kind"] for line in Ledger(folder.ledger).read()] == ["submitted", "job"]
    # The frozen code runs, and is what runs.
    shown = subprocess.run(
        [sys.executable, "-P", "-c", "import launch.slurm.supervisor as s; print(s.__file__)"],
        env={"PYTHONPATH": str(code), "PATH": ""}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.startswith(str(code))


def test_what_sbatch_refuses_leaves_nothing(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path) -> None:
    cluster.refusal = "Invalid account"
    with pytest.raises(SlurmError, match="Invalid account"):
        submitted(make_wish())
    assert not (tmp_path / "runs").exists()
    cluster.refusal = None
    submitted(make_wish())
    cluster.refusal = "Invalid account"
    with pytest.raises(SlurmError):
        submitted(make_wish())
    assert JobFolder(tmp_path / "runs/tiny").newest == 1


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_run_has_one_job(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path, state: str) -> None:
    submitted(make_wish())
    cluster.states["101"] = state
    for again in (lambda: submitted(make_wish()), lambda: resubmit(tmp_path / "runs/tiny")):
        with pytest.raises(ConfigError, match=f"101 is {state}.*rxt-dist launch stop"):
            again()
    cluster.states["101"] = "CANCELLED"
    assert submitted(make_wish()) == ["102"]
    assert JobFolder(tmp_path / "runs/tiny").newest == 2


def test_resume_submits_the_same_script_and_forgives_the_stop(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    run = tmp_path / "runs/tiny"
    with pytest.raises(ConfigError, match="never submitted"):
        resubmit(run)
    submitted(make_wish())
    (run / "STOP").touch()
    assert resubmit(run) == ["102"]
    described = JobFolder(run).description()
    assert described is not None
    assert (described.submission, described.jobs) == (1, ["101", "102"])
    assert described.old_stop == file_identity(run / "STOP") != ""
    (run / "finished.json").touch()
    with pytest.raises(ConfigError, match="is finished"):
        resubmit(run)


def test_a_chain_follows_one_another_and_a_stage_the_one_before(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    first = tmp_path / "runs/first"
    with pytest.raises(ConfigError, match="nothing can wait for it"):
        submitted(make_wish(after=first))
    JobFolder(first).submission(1).mkdir(parents=True)
    described = submit._description(make_wish(), 1, 60, [2])
    submit.replace(described, run=str(first), jobs=["7", "8"]).write()
    assert submitted(make_wish(after=first, requeue=False, chain=3)) == ["101", "102", "103"]
    assert cluster.submitted == [
        ("--dependency=singleton,afterok:8", "--kill-on-invalid-dep=yes"),
        ("--dependency=singleton",),
        ("--dependency=singleton",),
    ]
    (first / "finished.json").write_text('{"step": 1}')
    cluster.submitted.clear()
    submitted(make_wish(after=first))
    assert cluster.submitted == [()]


# ---------------------------------------------------------------------------------------------------------------------
# Time, places, partitions
# ---------------------------------------------------------------------------------------------------------------------


def test_the_signal_comes_in_time_for_what_the_run_needs(make_wish: Callable[..., Wish], tmp_path: Path) -> None:
    assert signal_lead(make_wish()) == 300
    assert signal_lead(make_wish(time="4m")) == 120, "no more than half of the time"
    run = tmp_path / "runs/tiny"
    run.mkdir(parents=True)
    append_line(run / "events.jsonl", {"kind": "save", "seconds": 200.0})
    append_line(run / "events.jsonl", {"kind": "save", "seconds": 90.0})
    append_line(run / "metrics.jsonl", {"step": 1, "step_s": 20.0})
    assert signal_lead(make_wish()) == 480, "twice the longest save, a step, a minute"
    with pytest.raises(ConfigError, match=r"--signal-lead 5m is shorter than the 480 s.*--signal-lead 480s"):
        signal_lead(make_wish(signal_lead="5m"))
    assert signal_lead(make_wish(signal_lead="10m")) == 600
    with pytest.raises(ConfigError, match=r"--signal-lead 2h is as long as the job \(--time 1h\)"):
        signal_lead(make_wish(signal_lead="2h", time="1h"))


def test_a_path_that_no_script_can_hold_is_refused(
    make_wish: Callable[..., Wish], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a b"
    odd.mkdir()
    wish = make_wish()
    monkeypatch.chdir(odd)
    monkeypatch.setattr(submit, "_node_counts", lambda wish: [2])
    with pytest.raises(ConfigError, match="a b cannot stand in a job's script"):
        render(wish, print)


KINDS = [
    NodeKind("gpu", True, 86400.0, 4, 64, 8),
    NodeKind("gpu", True, 86400.0, 2, 64, 0),
    NodeKind("cpu", False, 3600.0, 9, 32, 0),
]


@pytest.mark.parametrize(
    ("options", "nodes", "gpus", "words"),
    [
        ({"partition": "gpus"}, 1, 8, "no partition 'gpus'; it has cpu, gpu"),
        ({"time": "2d"}, 1, 8, "--time 2d is longer than partition gpu allows, 1440 minutes"),
        ({"partition": "cpu", "time": "30m"}, 1, 1, "1 GPUs a node are asked for, and nodes of partition cpu have 0"),
        ({"time": "1h"}, 5, 8, "5 nodes are asked for, and partition gpu has 4"),
    ],
)
def test_what_no_partition_has_is_refused(options: dict[str, Any], nodes: int, gpus: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_partition(JobOptions(**options), KINDS, nodes, gpus)


def test_what_a_partition_has_is_taken() -> None:
    check_partition(JobOptions(time="1d"), KINDS, 4, 8)
    check_partition(JobOptions(partition="cpu,gpu", time="1d"), KINDS, 6, 8)
    check_partition(JobOptions(), [], 4, 8)


def test_a_script_that_bash_cannot_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="bash cannot read the script"):
        check_script("export A='\n", JobOptions(), 1, 1)


def test_sinfo_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "gpu*|1-00:00:00|4|64|gpu:a100:8(S:0-1)\ncpu|infinite|9|32+|(null)\nshort|30:00|2|16|gpu:4,nvme:1\n"
    monkeypatch.setattr(client, "call", lambda *command, patience=0.0: shown)
    assert client.node_kinds() == [
        NodeKind("gpu", True, 86400.0, 4, 64, 8),
        NodeKind("cpu", False, float("inf"), 9, 32, 0),
        NodeKind("short", False, 1800.0, 2, 16, 4),
    ]


def test_containers(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path) -> None:
    wish = make_wish(container="/images/rxt.sif", mounts=("/data",))
    seen = [f"--bind={tmp_path}/runs/tiny", f"--bind={tmp_path}", "--bind=/data"]
    described = submit._description(wish, 1, 60, [2])
    assert described.prefix == ["apptainer", "exec", "--nv", *seen, "/images/rxt.sif"]
    assert described.python == "python3"
    described = submit._description(make_wish(container="rxt.sqsh", container_runtime="pyxis"), 1, 60, [2])
    assert described.prefix == []
    assert "--container-image=rxt.sqsh" in described.srun
    assert f"--container-mounts={tmp_path}/runs/tiny:{tmp_path}/runs/tiny,{tmp_path}:{tmp_path}" in described.srun


def test_code_is_frozen_once_for_each_content(tmp_path: Path) -> None:
    first = freeze_code(tmp_path)
    assert freeze_code(tmp_path) == first
    names = {
        path.relative_to(ROOT)
        for package in ("rxt_dist", "data_prep", "launch")
        for path in (ROOT / package).rglob("*.py")
    }
    assert {path.relative_to(first) for path in first.rglob("*.py")} == names
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    # It knows of which commit it is a copy.
    asked = "import json; from rxt_dist.train.run_dir import code_version; print(json.dumps(code_version()))"
    shown = subprocess.run(
        [sys.executable, "-P", "-c", asked], env={"PYTHONPATH": str(first)}, capture_output=True, check=True
    )
    assert json.loads(shown.stdout) == code_version()


@pytest.mark.slow
def test_what_would_refuse_the_run_at_its_start_refuses_its_submission(tmp_path: Path) -> None:
    """In a process of its own, on the real data."""
    tiny = TinyRun(tmp_path, build_shards(tmp_path))
    engine = ["parallel.engine=deepspeed", "parallel.zero=1", SHARED_BY_TWO]

    def counts(overrides: Sequence[str], **options: Any) -> list[int]:
        config = load_run(tiny.file, [*engine, *overrides])
        return submit._node_counts(Wish(config, SlurmOptions(gpus_per_node=1, **options)))

    # Eight rows a step, four at once.
    assert counts(["train.micro_batch_rows=1"], nodes=4, min_nodes=1) == [4, 2, 1]
    with pytest.raises(ConfigError, match="cannot share"):
        counts([], nodes=3)
    with pytest.raises(Exception, match="is not a dataset") as refused:
        counts([f"data.path={tmp_path}"], nodes=2)
    assert refused.value.exit_code == 65  # type: ignore[attr-defined]


def test_a_description_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.submission(1).mkdir(parents=True)
    (folder.submission(1) / "launch.json").write_text(json.dumps({"submission": 1, "new": 2}))
    with pytest.raises(ConfigError, match="does not describe a job"):
        folder.description()
