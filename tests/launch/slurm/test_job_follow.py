"""What a person is told of a run on a cluster, and how they stop it."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_job_life import describe

from launch.slurm import client, follow
from launch.slurm.client import JobState, SlurmError
from launch.slurm.follow import follow_run, headline, print_status, status_of, stop_run
from launch.slurm.ledger import Ledger
from rxt_dist.errors import ConfigError
from rxt_dist.train.events import append_line


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose job 7 was submitted."""
    described = describe(tmp_path)
    described.folder.submission(1).mkdir(parents=True)
    described.write()
    ledger = Ledger(described.folder.ledger)
    ledger.add("submitted", submission=1)
    ledger.add(
        "end", life="a", job="7", code=137, reason="rank 1 was killed", step=5, action="restart", blamed=["gpu2"]
    )
    ledger.add("bad_node", host="gpu3")
    append_line(tmp_path / "metrics.jsonl", {"step": 1200, "tokens": 9, "ar_loss": 2.34567, "tokens_per_s": 81234.5})
    append_line(tmp_path / "metrics.jsonl", {"step": 1200, "eval/en/true/ar_loss": 2.0})
    return tmp_path


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """States that the queue goes through; the last one stays. And what was cancelled."""
    queue: dict[str, Any] = {"states": [None], "cancelled": []}

    def job_state(job: str, patience: float = 0.0) -> JobState | None:
        states = queue["states"]
        return states.pop(0) if len(states) > 1 else states[0]

    monkeypatch.setattr(client, "there", lambda: True)
    monkeypatch.setattr(client, "job_state", job_state)
    monkeypatch.setattr(client, "last_state", lambda job: "COMPLETED")
    monkeypatch.setattr(client, "cancel", queue["cancelled"].append)
    monkeypatch.setattr(follow, "_FOLLOW_SECONDS", 0.0)
    return queue


def test_a_waiting_job_says_why(run: Path, queue: dict[str, Any]) -> None:
    queue["states"] = [JobState("PENDING", "Priority", "", "2026-11-28T03:00:00")]
    line = headline(status_of(run))
    assert line.startswith("job 7 PENDING (Priority) expected to start at 2026-11-28T03:00:00")
    queue["states"] = [JobState("PENDING", "None", "", "N/A")]
    assert headline(status_of(run)).startswith("job 7 PENDING | step 1,200, loss 2.3457 81,23")


def test_every_stage_shows_the_loss_of_its_first_term(run: Path, queue: dict[str, Any]) -> None:
    line = {"step": 1300, "mlm_loss": 3.25, "z_loss": 0.1, "eval/en/ar_loss": 9.0, "tokens_per_s": 10.0}
    append_line(run / "metrics.jsonl", line)
    assert "step 1,300, loss 3.2500" in headline(status_of(run))
    append_line(run / "metrics.jsonl", {"step": 1301, "ar_loss": None, "tokens_per_s": 10.0})
    assert "step 1,301 10 tokens/s" in headline(status_of(run))


def test_a_running_job_says_where_and_how_far(run: Path, queue: dict[str, Any]) -> None:
    queue["states"] = [JobState("RUNNING", "None", "gpu[1-2]")]
    (run / "job/status.json").write_text(json.dumps({"state": "checking nodes"}))
    assert headline(status_of(run)).startswith("job 7 RUNNING on gpu[1-2], checking nodes | step 1,200, loss 2.3457")


def test_everything_is_shown_and_as_json(run: Path, queue: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    print_status(run, as_json=False)
    shown = capsys.readouterr().out
    assert "life a (job 7) ended at step 5, code 137: rank 1 was killed" in shown
    assert "nodes that are avoided: gpu3" in shown
    Ledger(run / "job/ledger.jsonl").add(
        "end", life=None, job="8", code=143, reason="ended", step=5, action="cancelled"
    )
    print_status(run, as_json=False)
    assert "before a life (job 8) ended at step 5, code 143: ended" in capsys.readouterr().out
    print_status(run, as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert (value["newest"]["step"], value["excluded"], value["finished"]) == (1200, ["gpu3"], False)


def test_following_says_what_changes_and_ends_with_the_job(
    run: Path, queue: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    running = JobState("RUNNING", "None", "gpu1")
    queue["states"] = [JobState("PENDING", "Resources"), running, running, None]
    assert follow_run(run) == 137
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["PENDING", "RUNNING", "COMPLETED"]
    (run / "checkpoints/step-00000005").mkdir(parents=True)
    (run / "finished.json").write_text('{"step": 5}')
    assert follow_run(run) == 0


def test_a_waiting_job_is_cancelled_and_a_running_one_saves(run: Path, queue: dict[str, Any]) -> None:
    queue["states"] = [JobState("PENDING", "Priority")]
    assert next(stop_run(run, now=False)) == "job 7 is cancelled"
    assert not (run / "STOP").exists()
    queue["states"], queue["cancelled"][:] = [JobState("RUNNING")], []
    assert "saves at its next step" in next(stop_run(run, now=False))
    assert (run / "STOP").exists()
    assert queue["cancelled"] == []
    list(stop_run(run, now=True))
    assert queue["cancelled"] == ["7"]


def test_a_run_without_slurm_is_stopped_too(tmp_path: Path, queue: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="nothing to stop"):
        list(stop_run(tmp_path, now=False))
    append_line(tmp_path / "events.jsonl", {"kind": "start"})
    assert headline(status_of(tmp_path)) == "not running"
    with open(tmp_path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert headline(status_of(tmp_path)) == "training, without SLURM"
        list(stop_run(tmp_path, now=False))
    assert (tmp_path / "STOP").exists()


def test_a_queue_that_does_not_answer_for_a_while_ends_nothing(
    run: Path, queue: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        SlurmError("Socket timed out"),
        JobState("RUNNING", "None", "gpu1"),
        SlurmError("Socket timed out"),
        None,
    ]

    def job_state(job: str, patience: float = 0.0) -> JobState | None:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, SlurmError):
            raise answer
        return answer

    monkeypatch.setattr(client, "job_state", job_state)
    assert follow_run(run) == 137
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[3] for line in lines] == ["UNKNOWN", "RUNNING", "UNKNOWN", "COMPLETED"]
    assert "(Socket timed out)" in lines[0]
    answers[:] = [SlurmError("Socket timed out")]
    assert "STOP" in " ".join(stop_run(run, now=False))
    assert (run / "STOP").exists()
    assert queue["cancelled"] == []


def test_the_folder_of_a_chain_names_the_runs_of_its_links(tmp_path: Path, queue: dict[str, Any]) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links/joint.yaml").touch()
    links = {"texts": "data/texts", "joint": "runs/joint"}
    (tmp_path / "chain.json").write_text(json.dumps({"name": "x", "links": links}))
    for asked in (lambda: status_of(tmp_path), lambda: list(stop_run(tmp_path, now=False))):
        with pytest.raises(ConfigError, match=r"the folder of a chain.*name one of runs/joint\."):
            asked()


def test_to_stop_a_copy_leaves_the_job_of_the_original(run: Path, queue: dict[str, Any], tmp_path: Path) -> None:
    queue["states"] = [JobState("PENDING", "Priority")]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("copy"))
    with pytest.raises(ConfigError, match="nothing to stop"):
        list(stop_run(copy, now=False))
    assert queue["cancelled"] == []


def test_what_holds_no_run_is_refused(tmp_path: Path, queue: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="holds no run that was launched"):
        status_of(tmp_path)
    (tmp_path / "run.yaml").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("run.yaml", "loop", "missing"):
        with pytest.raises(ConfigError, match=f"{name} is no folder. Name a run directory"):
            list(stop_run(tmp_path / name, now=False))
