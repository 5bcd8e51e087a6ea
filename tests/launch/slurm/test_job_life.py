"""What a life of a job makes of the answers of its nodes and of how its ranks ended."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import life
from launch.slurm.job import Description
from launch.slurm.life import JobLife, Signals
from launch.slurm.steps import step_command, step_environment
from rxt_dist.train.events import append_line

HOSTS = ["gpu1", "gpu2"]
SOUND: dict[str, Any] = {"problems": [], "together": True}


def describe(run: Path, **changes: Any) -> Description:
    known = {
        "submission": 1, "run": str(run), "name": "tiny", "command": ["train", "run.yaml"], "once": [],
        "python": "/env/python", "node_counts": [2], "ranks_per_node": 2, "cpus_per_task": 4, "signal": "USR2",
        "lead": 60, "launcher": "srun", "requeue": True, "preflight": True, "prefix": [], "srun": ["--cpu-bind=cores"],
        "exclude": None, "chain": 1, "code": "/code", "old_stop": "", "jobs": ["7"], "after": [],
    }  # fmt: skip
    return Description(**(known | changes))


@pytest.fixture
def job_life(tmp_path: Path) -> JobLife:
    made = JobLife(describe(tmp_path / "run"), HOSTS, "7.0.0", 0, True, Signals())
    made.folder.mkdir(parents=True)
    return made


def rank_ended(life: JobLife, rank: int, code: int, at: float, words: str = "") -> None:
    host = HOSTS[rank // 2]
    (life.folder / f"exit-{rank}").write_text(json.dumps({"code": code, "host": host, "at": at}))
    if words:
        (life.folder / f"words-{rank}").write_text(words)


def ending(made: JobLife, overdue: bool = False) -> life.LifeEnd:
    return made._ending(life.read_exits(made.folder, made.ranks), overdue)


def test_a_bad_node_is_named_with_what_is_wrong(job_life: JobLife) -> None:
    end = job_life._verdict({"gpu1": SOUND, "gpu2": {"problems": ["no GPU", "no disk"], "together": False}}, True)
    assert end is not None
    assert (end.code, end.bad) == (69, {"gpu2": "no GPU; no disk"})
    assert "gpu2: no GPU; no disk" in end.text


def test_sound_nodes_are_sound(job_life: JobLife) -> None:
    assert job_life._verdict({host: dict(SOUND) for host in HOSTS}, True) is None


def test_a_check_ends_when_the_job_is_asked_to_stop(job_life: JobLife, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that have not answered by then are not bad."""

    class Slow:
        """A check that takes for ever."""

        ended = False

        def end(self) -> None:
            pass

    monkeypatch.setattr(job_life, "_start", lambda role, listen: Slow())
    monkeypatch.setattr(life, "_CHECK_SECONDS", 5.0)
    job_life._signals.user = signal.SIGUSR2
    end = job_life.check_nodes()
    assert end is not None
    assert (end.code, end.bad) == (75, {})


def test_where_all_nodes_fail_it_is_not_the_nodes(job_life: JobLife) -> None:
    answer = {"problems": ["no GPU"], "together": False}
    end = job_life._verdict({host: dict(answer) for host in HOSTS}, True)
    assert end is not None
    assert end.bad == {}
    assert "gpu1: no GPU" in end.reason


def test_a_node_that_cannot_be_reached_is_bad(job_life: JobLife, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start of a step fails on all nodes when it fails on one, so they are asked one by one."""
    asked = []

    def unreachable(hosts: list[str], seconds: float) -> list[str]:
        asked.append(hosts)
        return ["gpu2"]

    monkeypatch.setattr(life, "unreachable", unreachable)
    end = job_life._verdict({}, True)
    assert end is not None
    assert (end.bad, asked) == ({"gpu2": "does not answer"}, [HOSTS])
    monkeypatch.setattr(life, "unreachable", lambda hosts, seconds: [])
    end = job_life._verdict({}, True)
    assert end is not None, "nothing is known of them"
    assert end.bad == {}


def test_a_node_that_can_be_reached_and_is_silent_beside_others_is_bad(
    job_life: JobLife, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is not mounted there: nothing can be imported."""
    monkeypatch.setattr(life, "unreachable", lambda hosts, seconds: [])
    apart = {"problems": [], "together": False, "problem_together": "Timed out"}
    end = job_life._verdict({"gpu1": apart}, True)
    assert end is not None
    assert list(end.bad) == ["gpu2"]
    assert "the check does not start there" in end.text


def test_nodes_that_do_not_meet_are_not_bad_by_themselves(job_life: JobLife) -> None:
    apart = {"problems": [], "together": False, "problem_together": "Connection refused"}
    end = job_life._verdict({"gpu1": SOUND, "gpu2": apart}, True)
    assert end is not None
    assert (end.code, end.bad) == (69, {})
    assert "gpu2: Connection refused" in end.text


def test_all_ranks_ended_well(job_life: JobLife) -> None:
    for rank in range(4):
        rank_ended(job_life, rank, 0, rank)
    assert (ending(job_life).code, ending(job_life).blamed) == (0, ())


def test_a_stop_that_was_asked_for_counts_before_ranks_that_were_too_late(job_life: JobLife) -> None:
    for rank, code in enumerate([75, 75, 1, -9]):
        rank_ended(job_life, rank, code, rank)
    assert ending(job_life).code == 75


def test_the_first_failure_counts_and_a_kill_blames_its_node(job_life: JobLife) -> None:
    rank_ended(job_life, 2, -signal.SIGKILL, 10.0)
    rank_ended(job_life, 0, 1, 10.2, "Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]\n")
    end = ending(job_life)
    assert (end.code, end.blamed) == (137, ("gpu2",))
    assert end.reason.startswith("rank 2 was killed by signal 9")


def test_an_error_that_a_person_can_mend_is_said_in_its_words(job_life: JobLife) -> None:
    rank_ended(job_life, 1, 65, 10.0, "error: shards are gone\n")
    end = ending(job_life)
    assert (end.code, end.reason) == (65, "shards are gone")


def test_ranks_of_a_node_that_is_gone_leave_nothing(job_life: JobLife) -> None:
    rank_ended(job_life, 0, 0, 1.0)
    end = ending(job_life)
    assert end.code == 1
    assert "gpu2" in end.reason
    (job_life.folder / "exit-0").unlink()
    assert ending(job_life).code == 1


def test_the_run_itself_is_believed_and_a_hang_blames_its_host(job_life: JobLife) -> None:
    events = Path(job_life._wanted.run) / "events.jsonl"
    append_line(events, {"kind": "exit", "code": 86, "reason": "an earlier life's", "life": "old"})
    append_line(events, {"kind": "start", "life": job_life.token})
    append_line(events, {"kind": "hang", "host": "gpu2.cluster.lan", "rank": 3})
    append_line(events, {"kind": "exit", "code": 87, "reason": "rank 3 hangs", "life": job_life.token})
    end = ending(job_life)
    assert (end.code, end.reason, end.blamed) == (87, "rank 3 hangs", ("gpu2",))
    assert end.begun


def test_a_node_whose_check_fails_leaves_the_others_time_to_answer(tmp_path: Path) -> None:
    kills = {role: step_command(describe(tmp_path), role, HOSTS, tmp_path)[8] for role in ("rank", "agent", "check")}
    assert kills == {
        "rank": "--kill-on-bad-exit=1",
        "agent": "--kill-on-bad-exit=1",
        "check": "--kill-on-bad-exit=0",
    }


@pytest.mark.parametrize(
    ("role", "tasks", "cpus"), [("rank", "--ntasks=4", 4), ("agent", "--ntasks=2", 8), ("check", "--ntasks=2", 8)]
)
def test_steps_say_all_that_they_would_inherit(tmp_path: Path, role: str, tasks: str, cpus: int) -> None:
    command = step_command(describe(tmp_path, prefix=["apptainer", "exec", "image"]), role, HOSTS, tmp_path / "life")
    options = command[: command.index("/bin/sh")]
    assert {
        "--nodes=2",
        "--nodelist=gpu1,gpu2",
        tasks,
        f"--cpus-per-task={cpus}",
        "--export=ALL",
        "--distribution=block",
    } <= set(options)
    assert command[-9:-3] == ["apptainer", "exec", "image", "/env/python", "-m", "launch.slurm.task"]


def test_numbers_of_the_job_do_not_contradict_those_of_a_step() -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_TRES_PER_TASK": "cpu=8", "PATH": "/bin"}
    # Of a person's shell: labels would hide the answers of a check, other orders of ranks would blame other nodes.
    job |= {"SLURM_LABELIO": "1", "SLURM_DISTRIBUTION": "cyclic", "SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "none"}
    assert step_environment(job) == {"SLURM_JOB_ID": "7", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("changes", "passed_on"),
    [
        ({}, [signal.SIGUSR2]),
        ({"launcher": "torchrun"}, []),
        ({"prefix": ["apptainer"]}, []),
        ({"srun": ["--container-image=/x"]}, []),
    ],
)
def test_a_signal_goes_to_ranks_that_nothing_stands_before_and_a_file_to_all(
    tmp_path: Path, changes: dict[str, Any], passed_on: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = JobLife(describe(tmp_path / "run", **changes), HOSTS, "7.0.0", 0, True, Signals(user=signal.SIGUSR2))
    made.folder.mkdir(parents=True)
    made._signals.user_at = time.monotonic()
    looks, heard = iter([False, False, True]), []

    class Ranks:
        """They end at the third look."""

        @property
        def ended(self) -> bool:
            return next(looks)

        def pass_on(self, number: int) -> None:
            heard.append(number)

    monkeypatch.setattr(life, "_POLL_SECONDS", 0.0)
    assert made._wait(Ranks()) is False  # type: ignore[arg-type]
    assert (heard, (made.folder / "stop").exists()) == (passed_on, True)


def test_the_environment_is_recorded_without_secrets(job_life: JobLife, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JWT", "eyJ")
    monkeypatch.setenv("RXT_API_KEY", "k")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    job_life._record()
    written = json.loads((job_life.folder / "environment.json").read_text())["variables"]
    assert written["NCCL_DEBUG"] == "INFO"
    assert not {"SLURM_JWT", "RXT_API_KEY", "WANDB_API_KEY"} & set(written)


def test_a_second_signal_changes_nothing() -> None:
    signals = Signals()
    signals._note_user(signal.SIGUSR2, None)
    at = signals.user_at
    signals._note_user(signal.SIGHUP, None)
    assert (signals.user, signals.user_at, signals.ended) == (signal.SIGUSR2, at, None)
