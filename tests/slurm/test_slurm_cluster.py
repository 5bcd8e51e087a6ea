"""Runs on a real SLURM of several nodes: to the end, and through all that ends a job.

Everything is asserted from the state of the scheduler, the ledger and the run's own files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from cluster_run import ON_CPUS, TWO_NODES, ClusterRun
from rack import Rack

NewRun = Callable[..., ClusterRun]
Curve = list[tuple[float, ...]]
pytestmark = pytest.mark.slurm


def test_two_nodes_give_what_two_local_ranks_give(
    new_run: NewRun, local: ClusterRun, undisturbed: Curve, rack: Rack
) -> None:
    run = new_run("plain")
    run.launch()
    run.wait("ready", lambda: run.events("ready"))
    refused = run.rxt("launch", "slurm", str(run.file), *TWO_NODES, *ON_CPUS, expected=64)
    assert "has a job already" in refused
    assert run.detail("TimeLimit") == "00:20:00", "the script's, not the shell's"
    shown = json.loads(run.rxt("launch", "status", str(run.directory), "--json"))
    assert shown["jobs"][0]["state"] == "RUNNING"
    assert shown["supervisor"]["hosts"] == run.nodes()
    run.wait_for_end()
    run.require_finished_as(undisturbed)
    (life,) = run.ledger("life")
    assert len(set(life["hosts"])) == 2
    (end,) = run.ledger("end")
    assert (end["code"], end["action"]) == (0, "finished")
    # With the check of the nodes ten seconds more, where a start without SLURM takes five.
    own, alone = (float(each.events("ready")[0]["seconds"]) for each in (run, local))
    assert own - alone < 10 * max(1.0, alone / 5)
    folder = run.directory / "job/lives" / life["life"]
    assert json.loads((folder / "environment.json").read_text())["variables"]["SLURM_JOB_ID"] == run.job
    answers = json.loads((folder / "nodes.json").read_text())
    assert {host: answer["together"] for host, answer in answers.items()} == dict.fromkeys(life["hosts"], True)
    assert "is finished" in run.rxt("launch", "resume", str(run.directory), expected=64)
    # A job that starts on a finished run ends at once.
    again = rack.on_login(
        "sbatch", "--parsable", "--wait", str(run.directory / "job/0001/submit.sbatch")
    ).stdout.strip()
    assert "JobState=COMPLETED" in rack.on_login("scontrol", "-o", "show", "job", again).stdout
    assert len(run.ledger("life")) == 1


def test_a_signal_while_ranks_import_a_killed_rank_and_a_requeue(
    new_run: NewRun, undisturbed: Curve, rack: Rack
) -> None:
    run = new_run("troubled")
    job = run.launch("--no-preflight")
    run.wait("the first life", lambda: run.state() == "running")
    time.sleep(1.0)
    assert not run.events("start"), "the ranks have imported everything already"
    run.signal("USR2")
    run.wait("a requeue", lambda: len(run.ledger("life")) == 2)
    first = run.ledger("end")[0]
    assert (first["code"], first["action"]) == (75, "requeue")
    run.wait_for_step(run.ledger("life")[1]["checkpoint"] + 1)
    # The wrapper of a rank is the older of its two processes.
    victim = max(run.rank_processes(run.nodes()[1]))
    rack.on(run.nodes()[1], "kill", "-KILL", str(victim))
    run.wait("a restart", lambda: len(run.ledger("life")) == 3)
    killed = run.ledger("end")[1]
    assert (killed["code"], killed["action"], killed["blamed"]) == (137, "restart", [run.nodes()[1]])
    assert "rank 1 was killed by signal 9" in killed["reason"]
    run.wait("steps of the third life", lambda: len(run.events("ready")) == 3)
    run.wait_for_step(run.ledger("life")[2]["checkpoint"] + 1)
    rack.on_login("scontrol", "requeue", job)
    run.wait("the fourth life", lambda: len(run.ledger("life")) == 4)
    run.wait_for_end()
    assert [line["restart"] for line in run.ledger("life")] == [0, 1, 1, 2]
    run.require_finished_as(undisturbed)


def test_an_urgent_job_takes_the_nodes_and_gives_them_back(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("preempted")
    run.launch("--no-preflight", "--exclusive")
    run.wait_for_step(6)
    urgent = ["sbatch", "--parsable", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 2"]
    rack.on_login(*urgent)
    run.wait("the signal", lambda: run.ledger("end"))
    (end,), (stop,) = run.ledger("end"), run.events("stop")
    assert (end["code"], end["action"], end["step"]) == (75, "requeue", stop["step"])
    (told,) = run.ledger("signal")
    assert told["signal"] == "USR2"
    committed = datetime.fromisoformat(run.events("save")[-1]["time"])
    assert (committed - datetime.fromisoformat(told["received"])).total_seconds() < 10
    run.wait("the second life", lambda: len(run.ledger("life")) == 2)
    run.wait_for_end()
    run.require_finished_as(undisturbed)


def test_a_node_without_power_is_left(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("powerless")
    run.launch()
    run.wait_for_step(6)
    dark = run.nodes()[1]
    rack.power_off(dark)
    # SLURM would notice by itself, half a minute later: as where the node of the supervisor loses power.
    rack.on_login("scontrol", "update", f"nodename={dark}", "state=down", "reason=power")
    try:
        run.wait("a life elsewhere", lambda: dark not in run.nodes())
        run.wait_for_end()
        run.require_finished_as(undisturbed)
    finally:
        rack.boot(dark)


def test_cancelled_means_cancelled_and_resume_goes_on(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("cancelled")
    job = run.launch("--no-preflight")
    run.wait_for_step(6)
    rack.on_login("scancel", job)
    run.wait_for_end()
    assert run.detail("JobState") == "CANCELLED"
    run.wait("the supervisor's word", lambda: run.state() == "cancelled")
    assert run.ledger("end")[0]["action"] == "cancelled"
    assert [run.rank_processes(node) for node in run.nodes()] == [[], []]
    run.rxt("launch", "resume", str(run.directory))
    assert run.job != job
    run.wait("the second life", lambda: len(run.events("ready")) == 2)
    run.wait_for_step(run.ledger("life")[1]["checkpoint"] + 1)
    run.rxt("launch", "stop", str(run.directory))
    run.wait_for_end()
    assert (run.ledger("end")[1]["code"], run.state()) == (76, "stopped")
    run.rxt("launch", "resume", str(run.directory))
    run.wait_for_end()
    run.require_finished_as(undisturbed)


def test_what_another_start_cannot_mend_is_not_requeued(new_run: NewRun, rack: Rack, shards: Path) -> None:
    run = new_run("wrong", 8)
    moved = rack.folder / "moved"
    run.launch("--no-preflight", "--sbatch=--begin=now+3")
    shards.rename(moved)
    try:
        run.wait_for_end()
    finally:
        moved.rename(shards)
    assert (run.detail("JobState"), run.detail("Restarts"), run.detail("ExitCode")) == ("FAILED", "0", "65:0")
    (end,) = run.ledger("end")
    assert (end["code"], end["action"]) == (65, "failed")
    assert str(shards) in end["reason"]
    assert not (run.directory / "life.json").exists()


def test_a_bad_node_is_named_and_avoided(new_run: NewRun, rack: Rack) -> None:
    run = new_run("bad-node", 6)
    rack.on("gpu01", "mount", "-o", "remount,size=4k", "/dev/shm")
    try:
        run.launch()
        run.wait_for_end()
    finally:
        rack.on("gpu01", "mount", "-o", "remount,size=1g", "/dev/shm")
    (bad,) = run.ledger("bad_node")
    assert bad["host"] == "gpu01"
    assert "/dev/shm has 0 MB free" in bad["problem"]
    assert run.detail("ExcNodeList") == "gpu01"
    assert run.nodes() == ["gpu02", "gpu03"]
    assert run.state() == "finished"


def test_torchrun_starts_the_ranks_where_that_is_wanted(new_run: NewRun) -> None:
    run = new_run("agents", 4)
    run.launch("--no-preflight", "--launcher=torchrun")
    run.wait_for_end()
    assert [(end["code"], end["action"]) for end in run.ledger("end")] == [(0, "finished")]
