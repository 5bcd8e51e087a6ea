"""Decisions of a job's supervisor over many lives, with lives that are written down and a queue that only notes."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import client, supervisor
from launch.slurm.client import JobState, SlurmError
from launch.slurm.job import Description
from launch.slurm.ledger import Ledger
from launch.slurm.life import LifeEnd, Signals
from launch.slurm.supervisor import Supervisor
from rxt_dist.train.events import read_lines

HOSTS = ["gpu1", "gpu2", "gpu3"]
ENVIRON = {"SLURM_JOB_ID": "40", "SLURMD_NODENAME": "gpu1", "SLURM_JOB_NODELIST": "gpu[1-3]"}


class Queue:
    """What SLURM was asked for."""

    def __init__(self) -> None:
        self.requeued: list[str] = []
        self.excluded: list[str] = []
        self.state: JobState | None = JobState("RUNNING")
        self.nodes: dict[str, str] = {}
        self.refusal: str | None = None
        self.hosts = list(HOSTS)

    def requeue(self, job: str) -> None:
        if self.refusal:
            raise SlurmError(self.refusal)
        self.requeued.append(job)

    def exclude(self, job: str, hosts: Sequence[str]) -> None:
        self.excluded = list(hosts)


class World:
    """A run directory, its job's description, and the lives that are to come."""

    def __init__(self, folder: Path, queue: Queue) -> None:
        self.run, self.queue, self.signals = folder / "run", queue, Signals()
        (self.run / "checkpoints").mkdir(parents=True)
        self.wanted = Description(
            submission=1, run=str(self.run), name="tiny", command=["train", "run.yaml"], once=[], python="python",
            node_counts=[3], ranks_per_node=2, cpus_per_task=1, signal="USR2", lead=60, launcher="srun", requeue=True,
            preflight=True, prefix=[], srun=[], exclude=None, chain=1, code="/code", old_stop="", jobs=["40"], after=[],
        )  # fmt: skip
        self.ledger = Ledger(self.wanted.folder.ledger)
        self.wanted.folder.path.mkdir()
        self.ledger.add("submitted", submission=1)
        self.lives: Iterator[LifeEnd | tuple[int, LifeEnd]] = iter(())
        self.hosts: list[list[str]] = []
        self.cluster_hosts = queue.hosts
        self.once: list[bool] = []
        self.cancelled = False

    def supervise(self, *lives: Any, **environ: str) -> int:
        """Of each life: how it ends, or the step of a checkpoint that it makes, and how it ends."""
        self.lives = iter(lives)
        return Supervisor(self.wanted, ENVIRON | environ, self.signals).supervise()

    def save(self, step: int) -> None:
        (self.run / f"checkpoints/step-{step:08d}").mkdir()

    def finish(self, step: int) -> None:
        (self.run / "finished.json").write_text(json.dumps({"step": step}))

    def ends(self) -> list[dict[str, Any]]:
        return [line for line in self.ledger.read() if line["kind"] == "end"]

    def status(self) -> dict[str, Any]:
        return dict(json.loads(self.wanted.folder.status.read_bytes()))


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Queue:
    queue = Queue()
    monkeypatch.setattr(client, "requeue", queue.requeue)
    monkeypatch.setattr(client, "exclude", queue.exclude)
    monkeypatch.setattr(client, "host_names", lambda nodelist: list(queue.hosts))
    monkeypatch.setattr(client, "job_state", lambda job, patience=0.0: queue.state)
    monkeypatch.setattr(client, "node_states", lambda hosts: queue.nodes)
    for name in ("_BACK_OFF_SECONDS", "_REQUEUED_SECONDS", "_POLL_SECONDS"):
        monkeypatch.setattr(supervisor, name, 0.01)
    return queue


@pytest.fixture
def world(tmp_path: Path, queue: Queue, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path, queue)

    class Written:
        """A life that ends as the next one that is written down."""

        def __init__(self, wanted: Description, hosts: Sequence[str], *others: Any) -> None:
            self.hosts, self.ranks, self.token = list(hosts), 2 * len(hosts), f"life{len(world.hosts)}"
            world.hosts.append(self.hosts)
            described = next(world.lives)
            self.step, self.end = described if isinstance(described, tuple) else (None, described)

        def check_nodes(self) -> LifeEnd | None:
            return self.end if self.end.bad else None

        def run(self, once: bool) -> LifeEnd:
            world.once.append(once)
            (world.run / "logs").mkdir(exist_ok=True)
            (world.run / "life.json").write_text(json.dumps({"life": self.token}))
            if world.cancelled:
                world.signals.ended = 15
            if self.step is not None:
                world.save(self.step)
            if self.end.code == 0:
                world.finish(world.record_step())
            return self.end

    def record_step() -> int:
        return max((int(path.name[5:]) for path in (world.run / "checkpoints").iterdir()), default=-1)

    monkeypatch.setattr(world, "record_step", record_step, raising=False)
    monkeypatch.setattr(supervisor, "JobLife", Written)
    return world


DONE = LifeEnd(0, "finished")
CRASH = LifeEnd(1, "rank 0 failed: boom")
KILLED = LifeEnd(137, "rank 1 was killed by signal 9", blamed=("gpu2",))
BAD = LifeEnd(69, "bad nodes: gpu2", bad={"gpu2": "the driver shows 0 GPUs"})
PREEMPTED = LifeEnd(75, "a stop was asked for")


def test_a_run_goes_to_its_end(world: World) -> None:
    assert world.supervise((10, DONE)) == 0
    assert world.hosts == [HOSTS]
    assert world.status()["state"] == "finished"
    assert [(end["action"], end["progressed"], end["step"]) for end in world.ends()] == [("finished", True, 10)]


def test_a_finished_run_ends_at_once(world: World) -> None:
    world.save(10)
    world.finish(10)
    assert world.supervise(SLURM_RESTART_COUNT="2") == 0
    assert world.hosts == []
    world.save(20)
    assert world.supervise((30, DONE)) == 0, "what was finished is not what the run now is"
    assert len(world.hosts) == 1


def test_a_crash_is_started_again_on_the_spot(world: World) -> None:
    assert world.supervise(CRASH, (5, CRASH), (10, DONE)) == 0
    assert [end["action"] for end in world.ends()] == ["restart", "restart", "finished"]
    assert world.queue.requeued == []
    exits = [(event["life"], event["code"]) for event in read_lines(world.run / "events.jsonl")]
    assert exits == [("life0", 1), ("life1", 1), ("life2", 0)], "ranks that were killed say nothing"
    assert "life life1 ended with exit code 1" in (world.run / "logs/launcher.log").read_text()


def test_a_crash_loop_ends_over_restarts_and_requeues(world: World) -> None:
    for restart in range(2):
        world.queue.requeued.clear()
        world.supervise(CRASH, PREEMPTED, SLURM_RESTART_COUNT=str(restart))
        assert world.queue.requeued == ["40"]
    assert world.supervise(CRASH, CRASH, SLURM_RESTART_COUNT="2") == 93
    assert world.status()["code"] == 93
    assert read_lines(world.run / "events.jsonl")[-1]["kind"] == "crash_loop"
    world.ledger.add("submitted", submission=1, again=True)
    assert world.supervise(CRASH, (5, DONE)) == 0, "a person has taken it up again"


@pytest.mark.parametrize("code", [64, 65, 71, 74, 86])
def test_what_no_start_can_mend_ends_the_job(world: World, code: int) -> None:
    assert world.supervise(LifeEnd(code, "so it is")) == code
    assert world.queue.requeued == []
    assert (world.status()["state"], world.ends()[0]["action"]) == ("failed", "failed")


def test_a_signal_saves_and_requeues_and_the_reason_is_kept(world: World) -> None:
    world.signals.user = 12
    assert world.supervise() == 75, "it came before the ranks were started"
    assert world.queue.requeued == ["40"]
    world.signals.user = None
    assert world.supervise((5, PREEMPTED)) == 75
    assert world.status()["state"] == "requeued"


def test_a_job_that_was_ended_is_not_requeued(world: World) -> None:
    world.queue.state = JobState("COMPLETING")
    assert world.supervise((5, PREEMPTED)) == 75
    world.queue.state = None
    assert world.supervise(KILLED) == 137
    world.queue.state = JobState("RUNNING")
    world.cancelled = True
    assert world.supervise((7, PREEMPTED)) == 75
    assert world.queue.requeued == []
    assert {end["action"] for end in world.ends()} == {"cancelled"}


def test_a_job_that_is_ended_between_two_lives_starts_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Supervisor, "_pause", lambda self: setattr(world.signals, "ended", 15))
    assert world.supervise(CRASH, DONE) == 143
    assert (len(world.hosts), world.queue.requeued, world.status()["state"]) == (1, [], "cancelled")


def test_a_job_that_is_ended_just_before_its_requeue_is_not_revived(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM takes the requeue of a cancelled job."""

    def excluded(lines: Any) -> list[str]:
        world.signals.ended = 15
        return []

    monkeypatch.setattr(supervisor, "excluded_nodes", excluded)
    monkeypatch.setattr(Supervisor, "_usable", lambda self, hosts, also=(): hosts)
    assert world.supervise((5, PREEMPTED)) == 75
    assert (world.queue.requeued, world.status()["state"]) == ([], "cancelled")


def test_a_chain_is_cancelled_with_a_job_that_has_started_nothing_yet(world: World) -> None:
    world.wanted = replace(world.wanted, requeue=False)
    world.signals.ended = 15
    assert world.supervise() == 143
    world.signals.ended = None
    assert world.supervise(DONE, SLURM_JOB_ID="41") == 143
    assert world.hosts == []
    world.ledger.add("submitted", submission=1, again=True)
    assert world.supervise((5, DONE), SLURM_JOB_ID="42") == 0, "a person has taken it up again"


def test_a_ledger_that_was_torn_or_deleted_does_not_hide_a_crash_loop(world: World) -> None:
    world.wanted.folder.ledger.write_text('{"kind": "subm')
    assert world.supervise(CRASH, CRASH, CRASH, CRASH, DONE) == 93


def test_a_queue_that_does_not_answer_is_no_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(job: str, patience: float = 0.0) -> JobState | None:
        raise SlurmError("Unable to contact slurm controller")

    monkeypatch.setattr(client, "job_state", away)
    assert world.supervise((5, CRASH), (9, PREEMPTED)) == 75
    assert world.queue.requeued == ["40"]


def test_a_requeue_stands_where_the_nodes_cannot_be_excluded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(job: str, hosts: Sequence[str]) -> None:
        raise SlurmError("Invalid node name specified")

    monkeypatch.setattr(client, "exclude", refused)
    assert world.supervise(BAD) == 69
    assert (world.queue.requeued, world.status()["state"]) == (["40"], "requeued")


def test_a_bad_node_is_excluded_with_those_of_the_person(world: World) -> None:
    world.wanted = replace(world.wanted, exclude="gpu[7-9]")
    assert world.supervise(BAD) == 69
    assert world.queue.requeued == ["40"]
    assert world.queue.excluded == ["gpu[7-9]", "gpu2"]


def test_a_job_of_one_node_that_fails_its_check_everywhere_is_a_crash_loop(world: World) -> None:
    world.wanted = replace(world.wanted, node_counts=[1])
    codes = []
    for restart, host in enumerate(HOSTS + ["gpu4"]):
        bad = LifeEnd(69, "bad nodes", bad={host: "the driver shows 0 GPUs"})
        world.cluster_hosts[:] = [host]
        codes.append(world.supervise(bad, SLURM_RESTART_COUNT=str(restart)))
    assert codes == [69, 69, 69, 93]


def test_a_node_that_failed_twice_is_excluded(world: World) -> None:
    assert world.supervise((5, KILLED), (9, KILLED)) == 137
    assert world.queue.excluded == ["gpu2"]
    assert [end["action"] for end in world.ends()] == ["restart", "requeue"]


def test_fewer_nodes_do_where_that_was_asked_for(world: World) -> None:
    world.wanted = replace(world.wanted, node_counts=[3, 1])
    assert world.supervise(BAD, (5, DONE)) == 0
    assert world.hosts == [HOSTS, ["gpu1"]], "two were not among the numbers that the run can work on"
    assert world.queue.requeued == []


def test_a_life_that_ended_with_its_node_is_entered(world: World) -> None:
    world.wanted = replace(world.wanted, node_counts=[3, 2])
    for down in ({"gpu3": "down*"}, {"gpu3": "idle*", "gpu1": "allocated"}):
        world.queue.nodes = down
        world.ledger.add("life", life="dark", job="40", hosts=HOSTS, checkpoint=5)
        world.finish(99)
        assert world.supervise(LifeEnd(64, "no")) == 64
        assert world.ends()[-2]["blamed"] == ["gpu3"]
        assert world.ends()[-2]["excused"]
    assert world.hosts == [HOSTS, HOSTS[:2]]


def test_the_chain_goes_on_where_requeues_are_forbidden(world: World) -> None:
    world.wanted = replace(world.wanted, requeue=False)
    assert world.supervise((5, PREEMPTED)) == 75
    assert (world.queue.requeued, world.status()["state"]) == ([], "ended")
    assert world.supervise((9, DONE), SLURM_JOB_ID="41") == 0
    world.ledger.add("submitted", submission=1, again=True)
    (world.run / "finished.json").unlink()
    assert world.supervise(LifeEnd(64, "no"), SLURM_JOB_ID="42") == 64
    assert world.supervise(SLURM_JOB_ID="43") == 64, "what has ended one ends all"


def test_a_site_that_refuses_a_requeue_is_named(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.queue.refusal = "Requested operation is presently disabled"
    assert world.supervise((5, PREEMPTED)) == 75
    assert world.status()["state"] == "failed"
    said = capsys.readouterr().err
    assert "cannot be requeued: Requested operation is presently disabled" in said
    assert "rxt-dist launch resume" in said


def test_a_stop_before_the_start_stops(world: World) -> None:
    (world.run / "STOP").touch()
    assert world.supervise() == 76
    assert world.hosts == []


def test_going_back_to_a_checkpoint_happens_once(world: World) -> None:
    world.wanted = replace(world.wanted, once=["--from", "step-5"])
    world.save(20)
    world.finish(20)
    begun = replace(CRASH, begun=True)
    assert world.supervise(CRASH, begun, (30, DONE)) == 0
    assert world.once == [True, True, False], "until a life has taken the run"


def test_a_run_that_somebody_else_trains_is_refused(world: World) -> None:
    with open(world.run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (world.run / "life.json").write_text(json.dumps({"life": "theirs", "host": "laptop", "pid": 7}))
        assert world.supervise(DONE) == 64
        assert "life theirs, process 7 on laptop" in world.ends()[0]["reason"]


def test_an_earlier_life_on_a_machine_out_of_reach_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_LOCK_SECONDS", 0.05)
    with open(world.run / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (world.run / "life.json").write_text(json.dumps({"life": "dark", "host": "gpu9", "pid": 7}))
        world.ledger.add("life", life="dark", job="40", hosts=HOSTS, checkpoint=-1)
        assert world.supervise(DONE, DONE, DONE, DONE) == 93
        assert {end["code"] for end in world.ends()[1:]} == {69}


def test_the_job_of_an_array_is_named_by_array_and_number() -> None:
    names = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert supervisor.job_name(names) == "9_3"
    assert supervisor.job_name({"SLURM_JOB_ID": "12"}) == "12"
