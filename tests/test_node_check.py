"""What makes a node unfit for training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from taken_down import note_who_is_taken_down

from launch.slurm import life
from rxt_dist import node_check
from rxt_dist.node_check import ANSWER, problems_of_node
from rxt_dist.ranks import free_port

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def _on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_sound_node_has_no_problems(tmp_path: Path) -> None:
    assert list(problems_of_node(1, tmp_path)) == []


def test_full_places_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check.shutil, "disk_usage", lambda place: Usage(1, 0, 20 * 2**20))
    problems = list(problems_of_node(2, tmp_path))
    assert [problem.split()[0] for problem in problems] == ["/dev/shm", node_check.tempfile.gettempdir(), str(tmp_path)]
    assert problems[0].endswith("20 MB free and 32 MB are needed")
    assert len(list(problems_of_node(1, tmp_path))) == 2, "shared memory by the ranks"


def test_a_node_without_a_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(node_check.tempfile, "gettempdir", none)
    assert "no temporary folder can be written to (TMPDIR, /tmp, /var/tmp)" in list(problems_of_node(1, tmp_path))


def test_a_run_directory_that_is_not_there(tmp_path: Path) -> None:
    assert any("No such file" in problem for problem in problems_of_node(1, tmp_path / "gone"))


def test_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_check, "_available_memory", lambda: 2**30)
    assert list(problems_of_node(1, tmp_path)) == []
    assert list(problems_of_node(2, tmp_path)) == ["1.0 GB of memory are free, and 2 ranks need a GB each at least"]


def test_gpus_that_slurm_or_the_driver_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert "SLURM has given this node the GPUs '0', and 2 are needed" in list(problems_of_node(2, tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert list(problems_of_node(2, tmp_path)) == []
    monkeypatch.delenv("DS_ACCELERATOR")
    # Not made up: a CUDA build of torch would look for its driver.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (problem,) = problems_of_node(2, tmp_path)
    assert problem.startswith("the driver shows 1 GPUs, and 2 are needed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (30e9 if number else 79e9, 80e9))
    assert "GPU 1 has 30.0 of 80.0 GB free: another process uses it" in list(problems_of_node(2, tmp_path))


def test_a_product_that_comes_out_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda first, second: False)
    assert list(problems_of_node(1, tmp_path)) == ["a matrix product came out wrong on cpu"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_compute_together_and_answer_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken_down = note_who_is_taken_down(tmp_path, monkeypatch)
    port = str(free_port())
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    common["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "rxt_dist.node_check"]
    nodes = [
        subprocess.Popen(
            [*command, f"gpu{rank}", "1", str(tmp_path)], env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=60)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert not taken_down.exists()
    assert life.ANSWER == ANSWER
    for rank, output in enumerate(outputs):
        lines = [line.removeprefix(ANSWER) for line in output.splitlines() if line.startswith(ANSWER)]
        answers = [(answer["host"], answer["together"]) for answer in map(json.loads, lines)]
        assert answers == [(f"gpu{rank}", False), (f"gpu{rank}", True)]


@pytest.mark.slow
def test_a_crash_in_native_code_leaves_the_stacks(tmp_path: Path) -> None:
    """Here while it waits for another node."""
    meeting = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "rxt_dist.node_check", "gpu0", "1", str(tmp_path)]
    environment = {**os.environ, **meeting, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    node = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert node.stdout is not None
        assert node.stdout.readline().startswith(ANSWER)
        node.send_signal(signal.SIGABRT)
        said = node.communicate(timeout=30)[1]
    finally:
        node.kill()
    assert node.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in said
    assert "node_check.py" in said
