"""From a run file to a job, without SLURM: what is refused, what is written, what sbatch is told."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from training_run import SHARED_BY_TWO, TinyRun, build_shards

from launch.slurm import client, submit
from launch.slurm.client import JobState, NodeKind, SlurmError
from launch.slurm.container import in_container
from launch.slurm.freeze import freeze_code
from launch.slurm.job import JobFolder
from launch.slurm.ledger import Ledger
from launch.slurm.options import JobOptions, SlurmOptions
from launch.slurm.submit import Wish, check_partition, check_script, gpus_asked, render, resubmit, signal_lead
from rxt_dist.config.load import load_run
from rxt_dist.errors import ConfigError, DataError, UnavailableError
from rxt_dist.lives import file_identity
from rxt_dist.locks import Lock
from rxt_dist.train.events import append_line
from rxt_dist.train.run_dir import code_version

ROOT = Path(__file__).parents[3]


class Cluster:
    """What sbatch was told, and what it answers."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, ...]] = []
        self.cancelled: list[str] = []
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
    monkeypatch.setattr(client, "cancel", cluster.cancelled.append)
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

    def make(after: tuple[Path, ...] = (), **options: Any) -> Wish:
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


def test_a_chain_that_breaks_off_leaves_no_job(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that were submitted already would find nothing to run."""

    def submit_two(script: str, *options: str) -> str:
        if len(cluster.submitted) == 2:
            raise SlurmError("QOSMaxSubmitJobPerUserLimit")
        return Cluster.submit(cluster, script, *options)

    monkeypatch.setattr(client, "submit", submit_two)
    with pytest.raises(SlurmError, match="QOSMaxSubmit"):
        submitted(make_wish(requeue=False, chain=3))
    assert cluster.cancelled == ["101", "102"]
    assert not (tmp_path / "runs").exists()


def test_of_two_launches_at_one_time_one_is_refused(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the first look at the queue and the submission lie the seconds in which torch is loaded."""
    wish, run = make_wish(), tmp_path / "runs/tiny"

    def another(own: Wish) -> list[int]:
        monkeypatch.setattr(submit, "_node_counts", lambda wish: [2])
        assert submitted(wish) == ["101"]
        cluster.states["101"] = "PENDING"
        return [2]

    monkeypatch.setattr(submit, "_node_counts", another)
    with pytest.raises(ConfigError, match="101 is PENDING"):
        submitted(wish)
    assert (len(cluster.submitted), JobFolder(run).newest) == (1, 1)

    @contextmanager
    def late(path: Path, wait: bool = False) -> Iterator[Lock]:
        cluster.states["101"] = "RUNNING"
        yield Lock.TAKEN

    cluster.states["101"] = "CANCELLED"
    monkeypatch.setattr(submit, "locked", late)
    with pytest.raises(ConfigError, match="101 is RUNNING"):
        resubmit(run)
    assert len(cluster.submitted) == 1


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
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    (run / "finished.json").write_text('{"step": 1}')
    with pytest.raises(ConfigError, match="is finished"):
        resubmit(run)


def test_the_jobs_of_a_chain_are_as_many_again_when_it_is_resumed(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    submitted(make_wish(requeue=False, chain=3))
    assert resubmit(tmp_path / "runs/tiny") == ["104", "105", "106"]
    assert cluster.submitted[3:] == [("--dependency=singleton",)] * 3


def test_a_run_that_has_not_begun_waits_again_when_it_is_resumed(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    """The job of a link is cancelled with the one before; its first step needs that one's weights."""
    first, run = tmp_path / "runs/first", tmp_path / "runs/tiny"
    JobFolder(first).submission(1).mkdir(parents=True)
    described = submit._description(make_wish(), 1, 60, [2], tmp_path / "code")
    submit.replace(described, run=str(first), jobs=["8"]).write()
    cluster.states["8"] = "RUNNING"
    submitted(make_wish(after=(Path("runs/first"),)))
    resubmit(run)
    assert cluster.submitted == [("--dependency=afterok:8", "--kill-on-invalid-dep=yes")] * 2
    cluster.states["8"] = "FAILED"
    with pytest.raises(ConfigError, match=r"runs/first, whose last job \(8\) has ended, is not finished"):
        resubmit(run)
    (run / "checkpoints/step-00000001").mkdir(parents=True)
    resubmit(run)
    assert cluster.submitted[2:] == [()], "it has what it began with"


def test_the_jobs_of_a_copy_are_those_of_the_original(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    run, copy, link = (tmp_path / "runs" / name for name in ("tiny", "copy", "link"))
    submitted(make_wish())
    cluster.states["101"] = "RUNNING"
    shutil.copytree(run, copy)
    with pytest.raises(ConfigError, match="was moved or copied since"):
        resubmit(copy)
    link.symlink_to("tiny")
    with pytest.raises(ConfigError, match="101 is RUNNING"):
        resubmit(link)
    # What stands at the old place may have gone to another disk, with a link in its stead.
    run.rename(tmp_path / "disk")
    run.symlink_to(tmp_path / "disk")
    cluster.states.clear()
    assert resubmit(run) == ["102"]
    run.unlink()
    with pytest.raises(ConfigError, match="was moved or copied since"):
        resubmit(tmp_path / "disk")


def test_damaged_code_is_not_submitted_again(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path) -> None:
    """Many clusters delete what was not touched for weeks."""
    submitted(make_wish())
    run = tmp_path / "runs/tiny"
    (code,) = run.glob("job/code-*")
    (code / "rxt_dist/losses.py").unlink()
    with pytest.raises(ConfigError, match=r"rxt_dist/losses\.py.*`rxt-dist launch slurm RUN\.yaml`"):
        resubmit(run)
    assert submitted(make_wish()) == ["102"]
    assert (code / "rxt_dist/losses.py").exists(), "made whole"
    (code / "launch/ranks.py").write_text("")
    with pytest.raises(ConfigError, match=r"launch/ranks\.py"):
        resubmit(run)


def test_a_chain_follows_one_another_and_a_stage_the_one_before(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    first = tmp_path / "runs/first"
    with pytest.raises(ConfigError, match="nothing can wait for it"):
        submitted(make_wish(after=(first,)))
    JobFolder(first).submission(1).mkdir(parents=True)
    described = submit._description(make_wish(), 1, 60, [2], tmp_path / "code")
    submit.replace(described, run=str(first), jobs=["7", "8"]).write()
    with pytest.raises(ConfigError, match=r"whose last job \(8\) has ended, is not finished"):
        submitted(make_wish(after=(first,)))
    cluster.states["8"] = "PENDING"
    assert submitted(make_wish(after=(first,), requeue=False, chain=3)) == ["101", "102", "103"]
    assert cluster.submitted == [
        ("--dependency=singleton,afterok:8", "--kill-on-invalid-dep=yes"),
        ("--dependency=singleton",),
        ("--dependency=singleton",),
    ]
    second = tmp_path / "runs/second"
    JobFolder(second).submission(1).mkdir(parents=True)
    submit.replace(described, run=str(second), jobs=["9"]).write()
    cluster.states["9"] = "RUNNING"
    cluster.submitted.clear()
    submitted(make_wish(after=(first, second)))
    assert cluster.submitted == [("--dependency=afterok:8:9", "--kill-on-invalid-dep=yes")], "a run takes from both"
    (first / "checkpoints/step-00000001").mkdir(parents=True)
    cluster.submitted.clear()
    submitted(make_wish(after=(first,)))
    assert cluster.submitted == [("--dependency=afterok:8", "--kill-on-invalid-dep=yes")], "it has only begun"
    (first / "finished.json").write_text('{"step": 1}')
    cluster.submitted.clear()
    submitted(make_wish(after=(first,)))
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
    assert signal_lead(make_wish(time="10m")) == 480, "also where that is more than half of the time"
    with pytest.raises(ConfigError, match=r"--time 8m is no longer than the 480 s"):
        signal_lead(make_wish(time="8m"))


def test_a_path_that_no_script_can_hold_is_refused(
    make_wish: Callable[..., Wish], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wish = make_wish()
    monkeypatch.setattr(submit, "_node_counts", lambda wish: [2])
    # A colon would be the end of a folder in PYTHONPATH, and another copy of the code would run; % is SLURM's.
    for name in ("a b", "a:b", "a,b", "$(reboot)", "a'b", 'a"b', "a\nb", "zażółć", "100%", "a\\b"):
        odd = tmp_path / name
        odd.mkdir()
        monkeypatch.chdir(odd)
        with pytest.raises(ConfigError, match="cannot stand in a job's script"):
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
        ({"partition": "gpu,cpu", "time": "1h"}, 10, 1, "10 nodes are asked for, and partition gpu, cpu has 4"),
    ],
)
def test_what_no_partition_has_is_refused(options: dict[str, Any], nodes: int, gpus: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_partition(JobOptions(**options), KINDS, nodes, gpus)


def test_what_a_partition_has_is_taken() -> None:
    check_partition(JobOptions(time="1d"), KINDS, 4, 8)
    check_partition(JobOptions(partition="cpu,gpu", time="1d"), KINDS, 4, 8)
    check_partition(JobOptions(), [], 4, 8)
    check_partition(JobOptions(partition="gpu"), [], 4, 8)
    check_partition(JobOptions(partition="cpu", time="1h"), KINDS, 9, 0)


def test_where_a_cluster_counts_no_gpus_none_are_asked_for(make_wish: Callable[..., Wish], cluster: Cluster) -> None:
    text = render(make_wish(gres="none"), print)
    assert "--gres" not in text
    assert "--gpus" not in text
    assert [gpus_asked(make_wish(gres=gres).options) for gres in ("none", "xpu:2", "gpu:3090:2", None)] == [0, 0, 2, 2]
    with pytest.raises(ConfigError, match=r"--gres gpu:a100:4 has 4 GPUs a node, and --gpus-per-node 2 ranks"):
        render(make_wish(gres="gpu:a100:4"), print)


def test_a_look_asks_for_all_that_a_submission_asks_for(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nothing can wait for it"):
        render(make_wish(after=(tmp_path / "runs/first",)), print)
    (tmp_path / "runs").touch()
    with pytest.raises(ConfigError, match="a file"):
        render(make_wish(), print)


def test_a_script_that_bash_cannot_read_is_refused() -> None:
    with pytest.raises(ConfigError, match="bash cannot read the script"):
        check_script("export A='\n", JobOptions(), 1, 1)


def test_apptainer(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path) -> None:
    wish = make_wish(container="/images/rxt.sif", mounts=("/data:/d", "more"), env={"NCCL_DEBUG": "INFO"})
    code = tmp_path / "runs/tiny/job/code-1"
    elsewhere = Path("/scratch/shards")
    data = wish.config.data.model_copy(update={"path": elsewhere})
    prefix, srun = in_container(wish.options, wish.config.model_copy(update={"data": data}), wish.run, code)
    seen = [tmp_path / "runs/tiny", tmp_path, "/data:/d", tmp_path / "more", elsewhere]
    binds = [f"--bind={place}" for place in seen]
    assert prefix == ["apptainer", "exec", "--nv", f"--env=PYTHONPATH={code}", *binds, "/images/rxt.sif"]
    assert srun == []
    assert submit._description(wish, 1, 60, [2], code).python == "python3"


def test_pyxis(make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "rxt.sqsh").touch()
    options = {"container_runtime": "pyxis", "env": {"NCCL_DEBUG": "INFO"}}
    wish = make_wish(container="rxt.sqsh", **options)
    prefix, srun = in_container(wish.options, wish.config, wish.run, tmp_path / "code")
    assert prefix == []
    # What begins with neither . nor / is the name of an image in a registry to pyxis.
    assert srun[0] == f"--container-image={tmp_path}/rxt.sqsh"
    places = [tmp_path / "runs/tiny", tmp_path]
    assert srun[1] == f"--container-mounts={','.join(f'{place}:{place}' for place in places)}"
    assert srun[2:] == [
        f"--container-workdir={tmp_path}",
        "--container-env=PYTHONPATH,PYTHONSAFEPATH,PYTHONUNBUFFERED,NCCL_DEBUG",
    ]
    wish = make_wish(container="nvcr.io#nvidia/pytorch:24.10", **options)
    srun = in_container(wish.options, wish.config, wish.run, tmp_path / "code")[1]
    assert srun[0] == "--container-image=nvcr.io#nvidia/pytorch:24.10"


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


def test_the_other_process_is_quoted_whole_and_waited_for_no_longer_than_it_takes(
    make_wish: Callable[..., Wish], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf 'warning: x\\nerror: web: yaml error: line 3\\n' >&2; exit 65\n")
    python.chmod(0o755)
    monkeypatch.setattr(submit.sys, "executable", str(python))
    with pytest.raises(DataError, match=r"^web: yaml error: line 3$"):
        submit._node_counts(make_wish())
    python.write_text("#!/bin/sh\nexec sleep 5\n")
    monkeypatch.setattr(submit, "_ADMISSION_SECONDS", 0.05)
    with pytest.raises(UnavailableError, match=r"within 0\.05 s"):
        submit._node_counts(make_wish())


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
    with pytest.raises(Exception, match="is not a dataset") as refused:
        counts([f"data.path={tmp_path}"], nodes=2)
    assert refused.value.exit_code == 65  # type: ignore[attr-defined]


def test_a_description_of_another_version_is_refused(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path)
    folder.submission(1).mkdir(parents=True)
    (folder.submission(1) / "launch.json").write_text(json.dumps({"submission": 1, "run": str(tmp_path), "new": 2}))
    with pytest.raises(ConfigError, match="does not describe a job"):
        folder.description()


def test_and_the_run_is_submitted_again_unless_that_version_has_a_job(
    make_wish: Callable[..., Wish], cluster: Cluster, tmp_path: Path
) -> None:
    submitted(make_wish())
    cluster.states["101"] = "RUNNING"
    (tmp_path / "runs/tiny/job/0001/launch.json").write_text('{"of": "another version"}')
    with pytest.raises(ConfigError, match="101 is RUNNING"):
        submitted(make_wish())
    cluster.states.clear()
    assert submitted(make_wish()) == ["102"]
