"""What takes long to come about on a cluster, and other ways to start ranks there. `make test-slurm-slow`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cluster_run import ROOT, ClusterRun
from rack import Rack

NewRun = Callable[..., ClusterRun]
Curve = list[tuple[float, ...]]
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(400)]


def test_the_real_time_limit(new_run: NewRun) -> None:
    run = new_run("limited", 500)
    run.launch("--time=2m", "--signal-lead=30s")
    run.wait("the signal", lambda: run.ledger("end"), 150)
    assert (run.ledger("end")[0]["code"], run.ledger("end")[0]["action"]) == (75, "requeue")
    run.wait("the second life", lambda: len(run.events("ready")) == 2)
    run.wait("another start or the end", lambda: len(run.ledger("end")) == 2, 150)
    steps = [line["step"] for line in run.lines("metrics.jsonl") if "ar_loss" in line]
    assert steps == list(range(1, len(steps) + 1))
    assert run.events("resume")[0]["lost_steps"] == 0


@pytest.mark.parametrize("which", [1, 0], ids=["another node", "the node of rank 0"])
def test_a_cut_cable(new_run: NewRun, undisturbed: Curve, rack: Rack, which: int) -> None:
    """Ranks beyond the cut live on for a while, and publish nothing; where rank 0 is one of them, it is waited for."""
    run = new_run(f"cut-{which}")
    run.launch("health.deadlines.step=30")
    run.wait_for_step(6)
    cut = run.nodes()[which]
    rack.cut(cut)
    try:
        run.wait("a life elsewhere", lambda: cut not in run.nodes(), 150)
        run.wait_for_end(200)
        run.require_finished_as(undisturbed)
    finally:
        rack.heal(cut)
        rack.resume(cut)
    run.wait("the end of all ranks beyond the cut", lambda: not run.rank_processes(cut), 120)


def test_the_node_of_the_supervisor_loses_power(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("headless")
    run.launch()
    run.wait_for_step(6)
    dark = run.nodes()[0]
    rack.power_off(dark)
    try:
        run.wait("a life elsewhere", lambda: dark not in run.nodes(), 150)
        run.wait_for_end()
        run.require_finished_as(undisturbed)
        assert run.ledger("end")[0]["blamed"] == [dark]
    finally:
        rack.boot(dark)


def test_a_chain_of_jobs_where_requeues_are_forbidden(new_run: NewRun, undisturbed: Curve) -> None:
    run = new_run("chained")
    run.launch("--no-preflight", "--no-requeue", "--chain=3")
    first, second, third = (str(line["job"]) for line in run.ledger("job"))
    run.wait_for_step(6)
    run.rack.on_login("scancel", "--batch", "--signal=USR2", first)
    run.wait("the second job", lambda: len(run.ledger("life")) == 2)
    assert run.ledger("life")[1]["job"] == second
    run.wait_for_end()
    assert run.job == third
    assert len(run.ledger("life")) == 2, "the third found the run finished"
    run.require_finished_as(undisturbed)


def test_fewer_nodes_where_one_is_bad(new_run: NewRun, rack: Rack) -> None:
    run = new_run("fewer", 6)
    rack.on("gpu01", "mount", "-o", "remount,size=4k", "/dev/shm")
    try:
        run.launch("--min-nodes=1")
        run.wait_for_end()
    finally:
        rack.on("gpu01", "mount", "-o", "remount,size=1g", "/dev/shm")
    assert [life["hosts"] for life in run.ledger("life")] == [["gpu01", "gpu02"], ["gpu02"]], (
        "first as many as are free"
    )
    assert run.detail("Restarts") == "0"
    assert run.state() == "finished"


def test_a_node_that_lacks_a_disk_is_named_and_avoided(new_run: NewRun, rack: Rack) -> None:
    run = new_run("diskless", 6)
    rack.on("gpu02", "mount", "-t", "tmpfs", "tmpfs", str(Path(torch.__file__).parent))
    try:
        run.launch()
        run.wait_for_end(240)
    finally:
        rack.on("gpu02", "umount", str(Path(torch.__file__).parent))
    (bad,) = run.ledger("bad_node")
    assert (bad["host"], run.state(), "gpu02" in run.nodes()) == ("gpu02", "finished", False)
    assert "the check does not start there" in bad["problem"]


def test_agents_of_torchrun_are_asked_to_stop_by_a_file(new_run: NewRun) -> None:
    """A signal would end them."""
    run = new_run("agents-stop", 8)
    run.launch("--no-preflight", "--launcher=torchrun")
    run.wait_for_step(3)
    run.signal("USR2")
    run.wait("a requeue", lambda: len(run.ledger("life")) == 2)
    run.wait_for_end()
    assert [(end["code"], end["action"]) for end in run.ledger("end")] == [(75, "requeue"), (0, "finished")]


def test_a_requeue_at_once_and_the_end_of_the_supervisor(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("beheaded")
    job = run.launch("--no-preflight")
    run.wait("its start", lambda: run.queue() == "RUNNING")
    rack.on_login("scontrol", "requeue", job)
    run.wait("another start", lambda: run.detail("Restarts") == "1" and run.queue() == "RUNNING")
    run.wait_for_step(6)
    (pid,) = run.supervisor()
    rack.on(run.nodes()[0], "kill", "-KILL", str(pid))
    run.wait_for_end()
    assert run.detail("JobState") == "FAILED"
    run.wait("the end of all ranks", lambda: not any(run.rank_processes(node) for node in run.nodes()))
    run.rxt("launch", "resume", str(run.directory))
    run.wait_for_end()
    run.require_finished_as(undisturbed)


def test_a_stage_waits_for_the_one_before(new_run: NewRun) -> None:
    """Also while that is requeued."""
    first, second = new_run("stage-1", 12), new_run("stage-2", 6)
    first.launch("--no-preflight")
    second.launch(
        "--no-preflight", f"--after={first.directory}", f"start={{run: {first.directory}, parts: [embedding, encoder]}}"
    )
    first.wait_for_step(2)
    first.signal("USR2")
    first.wait("a requeue", lambda: len(first.ledger("life")) == 2)
    assert second.queue("%T %r") == "PENDING Dependency"
    second.wait_for_end()
    assert (first.state(), second.state()) == ("finished", "finished")
    assert second.events("begin")[0]["step"] == 12


# ---------------------------------------------------------------------------------------------------------------------
# Ranks that a person starts on each node: the commands of docs/slurm.md
# ---------------------------------------------------------------------------------------------------------------------


def on_two_nodes(rack: Rack, run: ClusterRun, command: Callable[[int], list[str]]) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    variables = [f"PATH={path}", f"PYTHONPATH={ROOT}", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    started = [
        subprocess.Popen(
            [*rack.enter(f"gpu0{number + 1}"), "env", *variables, *command(number), "train", str(run.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(outputs)


def test_srun_by_hand(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("srun")
    variables = ["env", f"PYTHONPATH={ROOT}", "DS_ACCELERATOR=cpu", "OMP_NUM_THREADS=1"]
    step = ["srun", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", sys.executable, "-m", "rxt_dist"]
    rack.on_login(*variables, *step, "train", str(run.file), timeout=120)
    assert run.curve() == undisturbed


def test_torchrun_by_hand(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("torchrun")
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=gpu01", "--master-port=29500"]
    on_two_nodes(rack, run, lambda node: ["torchrun", *meeting, f"--node-rank={node}", "-m", "rxt_dist"])
    assert run.curve() == undisturbed


def test_the_deepspeed_launcher_by_hand(new_run: NewRun, undisturbed: Curve, rack: Rack) -> None:
    run = new_run("deepspeed")
    hosts = rack.folder / "hostfile"
    hosts.write_text("gpu01 slots=1\ngpu02 slots=1\n")
    meeting = [f"--hostfile={hosts}", "--no_ssh", "--master_addr=gpu01", "--master_port=29501", "--no_local_rank"]
    on_two_nodes(rack, run, lambda node: ["deepspeed", *meeting, f"--node_rank={node}", "--module", "rxt_dist"])
    # It gives ranks other numbers of threads.
    assert run.curve() == [pytest.approx(line, rel=1e-6) for line in undisturbed]
