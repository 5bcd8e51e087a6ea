"""A dataset by an array of jobs: what is submitted, and what a job does with its build."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.slurm import array, client, data_task
from launch.slurm.array import ArrayWish, render_array, submit_array
from launch.slurm.client import JobState, SlurmError
from launch.slurm.data_task import run_to_the_end
from launch.slurm.life import Signals
from launch.slurm.options import ArrayOptions
from rxt_dist.config.load import load_data
from rxt_dist.errors import ConfigError
from rxt_dist.locks import locked


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    queue: dict[str, Any] = {"submitted": [], "requeued": [], "refusal": None, "cancelled": [], "states": {}}

    def submit(script: str, *options: str) -> str:
        if queue["refusal"]:
            raise SlurmError(queue["refusal"])
        queue["submitted"].append((Path(script).name, *options))
        return str(50 + len(queue["submitted"]))

    def job_state(job: str, patience: float = 0.0) -> JobState | None:
        return JobState(queue["states"][job]) if job in queue["states"] else None

    monkeypatch.setattr(client, "submit", submit)
    monkeypatch.setattr(client, "job_state", job_state)
    monkeypatch.setattr(client, "there", lambda: True)
    monkeypatch.setattr(client, "requeue", queue["requeued"].append)
    monkeypatch.setattr(client, "cancel", queue["cancelled"].append)
    monkeypatch.setattr(array, "check_script", lambda text, options, nodes, gpus: None)
    monkeypatch.setattr(array, "check_where_possible", lambda text, options, nodes, gpus, warn: None)
    monkeypatch.setattr(data_task, "_REQUEUED_SECONDS", 0.0)
    return queue


@pytest.fixture
def make_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ArrayWish]:
    monkeypatch.chdir(tmp_path)

    def make(**changes: Any) -> ArrayWish:
        file = tmp_path / "data.yaml"
        build = {"sources": [{"name": "web", "inputs": ["corpus"]}]}
        file.write_text(yaml.safe_dump({"path": "shards/web", "seq_len": 64, "build": build} | changes))
        return ArrayWish(file, load_data(file, []), ArrayOptions(tasks=4))

    return make


def test_a_job_closes_what_an_array_has_built(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path
) -> None:
    told = list(submit_array(make_wish()))
    assert queue["submitted"] == [("submit.sbatch",), ("close.sbatch", "--dependency=afterany:51")]
    assert told[0] == "array 51 of 4 jobs"
    written = tmp_path / "shards/web.job/0001"
    assert {path.name for path in written.iterdir()} == {"data.yaml", "submit.sbatch", "close.sbatch", "jobs"}
    assert "data_task build" in (written / "submit.sbatch").read_text()
    assert (written / "close.sbatch").read_text().rstrip().endswith("8 shards/web")
    list(submit_array(make_wish()))
    assert (tmp_path / "shards/web.job/0002/jobs").read_text() == "53\n54\n"


def test_duplicates_are_surveyed_by_an_array_of_their_own(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any]
) -> None:
    build = {"sources": [{"name": "web", "inputs": ["corpus"]}], "clean": {"exact_duplicates": True}}
    list(submit_array(make_wish(build=build)))
    assert queue["submitted"] == [
        ("submit.sbatch",),
        ("submit.sbatch", "--dependency=afterany:51"),
        ("close.sbatch", "--dependency=afterany:52"),
    ]


def test_an_array_whose_closing_job_is_refused_is_taken_back(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would build a dataset that nothing completes, or fail because its files are gone."""
    whole = client.submit

    def first_only(script: str, *options: str) -> str:
        if options:
            raise SlurmError("QOSMaxSubmitJobPerUserLimit")
        return whole(script)

    monkeypatch.setattr(client, "submit", first_only)
    with pytest.raises(SlurmError, match="QOSMaxSubmit"):
        list(submit_array(make_wish()))
    assert queue["cancelled"] == ["51"]
    assert not (tmp_path / "shards/web.job/0001").exists()


def test_a_dataset_is_built_by_one_array_at_a_time(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path
) -> None:
    list(submit_array(make_wish()))
    queue["states"] = {"51": "RUNNING", "52": "PENDING"}
    with pytest.raises(ConfigError, match=r"job 51 is RUNNING.*`squeue -j 51,52`.*`scancel 51 52`") as refused:
        list(submit_array(make_wish()))
    assert refused.value.exit_code == 64
    # The closing job alone would begin when the array is gone, and build what is left.
    queue["states"] = {"51": "CANCELLED", "52": "PENDING"}
    with pytest.raises(ConfigError, match=r"job 52 is PENDING.*`scancel 52`"):
        list(submit_array(make_wish()))
    assert len(queue["submitted"]) == 2
    assert not (tmp_path / "shards/web.job/0002").exists()
    # Ended, then forgotten by the queue.
    for number, states in ((2, {"51": "COMPLETED", "52": "FAILED"}), (3, {})):
        queue["states"] = states
        list(submit_array(make_wish()))
        assert (tmp_path / f"shards/web.job/{number:04d}/jobs").exists()


def test_of_two_submissions_at_one_time_one_is_refused(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "shards/web.job").mkdir(parents=True)
    with locked(tmp_path / "shards/web.job/.lock"), pytest.raises(ConfigError, match="by another process"):
        list(submit_array(make_wish()))
    assert queue["submitted"] == []


def test_the_first_array_is_noted_before_the_next_job_is_submitted(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever kills the command in between leaves an array that has to be found."""
    noted: list[str] = []
    whole = client.submit

    def look(script: str, *options: str) -> str:
        noted.extend(path.read_text() for path in tmp_path.glob("shards/web.job/*/jobs"))
        return whole(script, *options)

    monkeypatch.setattr(client, "submit", look)
    list(submit_array(make_wish()))
    assert noted == ["51\n"]


def test_what_is_refused_leaves_no_try(
    make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for missing in ("build", "seq_len"):
        with pytest.raises(ConfigError, match=f"has no `{missing}`"):
            list(submit_array(make_wish(**{missing: None})))
    with pytest.raises(ConfigError, match="cannot stand in a job's script"):
        list(submit_array(make_wish(path="my shards/web")))
    assert not (tmp_path / "my shards").exists()
    queue["refusal"] = "Invalid account"
    with pytest.raises(SlurmError):
        list(submit_array(make_wish()))
    assert not (tmp_path / "shards/web.job/0001").exists()
    monkeypatch.setattr(client, "there", lambda: False)
    with pytest.raises(ConfigError, match="sbatch"):
        list(submit_array(make_wish()))


def test_a_look_writes_nothing(make_wish: Callable[..., ArrayWish], queue: dict[str, Any], tmp_path: Path) -> None:
    wish = make_wish()
    text = render_array(wish, print)
    assert text.count("#!/bin/bash") == 2
    assert "--array=0-3\n" in text
    assert not (tmp_path / "shards").exists()


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Callable[[], int]]:
    """In place of `python -m rxt_dist`: a program that counts its starts; the number is handed to its code as `n`."""

    def make(code: str) -> Callable[[], int]:
        starts = tmp_path / "starts"
        script = tmp_path / "program"
        script.write_text(
            f"#!{sys.executable} -S\nimport os, signal, sys, time\nfrom pathlib import Path\n"
            f"starts = Path({str(starts)!r})\nstarts.open('a').write('x')\nn = len(starts.read_text())\n{code}\n"
        )
        script.chmod(0o755)
        monkeypatch.setattr(data_task.sys, "executable", str(script))
        return lambda: len(starts.read_text())

    return make


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def test_a_build_that_the_system_kills_is_tried_three_times(program: Callable[[str], Callable[[], int]]) -> None:
    starts = program(f"if n < 3: {KILL}")
    assert run_to_the_end(["data", "build"], Signals()) == 0
    assert starts() == 3


def test_and_not_for_ever(program: Callable[[str], Callable[[], int]]) -> None:
    starts = program(KILL)
    assert run_to_the_end(["data", "build"], Signals()) == 137
    assert starts() == 3


def test_what_another_try_cannot_mend_is_not_tried(program: Callable[[str], Callable[[], int]]) -> None:
    starts = program("sys.exit(65)")
    assert run_to_the_end(["data", "build"], Signals()) == 65
    assert starts() == 1


def test_a_job_whose_time_is_over_goes_back_into_the_queue(
    program: Callable[[str], Callable[[], int]], queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("time.sleep(60)")
    for name, value in {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2"}.items():
        monkeypatch.setenv(name, value)
    assert run_to_the_end(["data", "build"], Signals(user=signal.SIGUSR2)) == 75
    assert queue["requeued"] == ["7_2"]
    assert run_to_the_end(["data", "build"], Signals(ended=signal.SIGTERM)) == 143
    assert queue["requeued"] == ["7_2"], "one that is cancelled does not"
