"""A rank that is stopped: the other one says so, names it, and ends within the deadline."""

from __future__ import annotations

import os
import signal
import time
from datetime import datetime

import pytest
from training_run import SHARED_BY_TWO, TinyRun, build_shards, start

from rxt_dist.ranks import free_port

# Seconds: what is allowed, and what the looks take that must agree, on busy cores.
DEADLINE, LOOKS = 8, 12

pytestmark = [pytest.mark.faults, pytest.mark.distributed]


@pytest.mark.parametrize("victim", [1, 0])
def test_a_stopped_rank_is_named_within_the_deadline(tmp_path, victim, monkeypatch):
    """Also where the stopped rank is the one that serves the run's store."""
    tiny = TinyRun(tmp_path, build_shards(tmp_path), steps=4000)
    # Far above a step of two ranks that share the cores with other tests.
    limits = f"{{step: {DEADLINE}, data: {DEADLINE}, set_up: 60, load: 60, save: 60, evaluate: 60}}"
    overrides = ["parallel.engine=deepspeed", SHARED_BY_TWO, f"health.deadlines={limits}"]
    overrides.append("checkpoint.every_tokens=1e9")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setenv("WORLD_SIZE", "2")
    processes = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        processes.append(start(tiny.train_command(*overrides)))
    other = processes[1 - victim]
    end = time.monotonic() + 60
    while not any(line["step"] >= 5 for line in tiny.lines()):
        assert time.monotonic() < end
        assert other.poll() is None, other.communicate()[0]
        time.sleep(0.05)
    os.kill(processes[victim].pid, signal.SIGSTOP)
    stopped = time.time()
    try:
        output, _ = other.communicate(timeout=30)
    finally:
        os.kill(processes[victim].pid, signal.SIGKILL)
    assert other.returncode == 87, output
    assert f"rank {victim} on " in output
    (event,) = tiny.events("hang")
    assert event["rank"] == victim
    named = datetime.fromisoformat(event["time"]).timestamp()
    assert named - stopped < DEADLINE + LOOKS
    stacks = (tiny.directory / f"logs/stacks-rank-{1 - victim}.txt").read_text()
    assert "run_loop" in stacks
