"""A dataset that an array of jobs builds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from cluster_run import ROOT
from rack import Rack

from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.synthetic import write_sample
from rxt_dist.config.load import load_data
from rxt_dist.data.manifest import load_manifest

pytestmark = pytest.mark.slurm


def submit(rack: Rack, data: Path, *options: str) -> list[str]:
    """The ids of the array and of the job that closes it."""
    command = [sys.executable, "-m", "rxt_dist", "launch", "slurm-data", str(data), "--cpus-per-task=1", "--time=10m"]
    rack.on_login("env", f"PYTHONPATH={ROOT}", *command, *options)
    tries = sorted(data.parent.glob("web.job/*/jobs"))
    return tries[-1].read_text().split()


def wait(what: str, until: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"{what} not within {seconds} s"
        time.sleep(0.05)


def test_an_array_of_another_size_completes_what_a_killed_task_left(rack: Rack) -> None:
    folder = rack.folder / "array"
    folder.mkdir()
    write_sample(folder / "corpus", text_bytes=400_000)
    sources = [{"name": "all", "inputs": [str(folder / "corpus")], "language": "en"}]
    build = {"sources": sources, "vocab_size": 600, "unit_mb": 0.02}
    data = folder / "data.yaml"
    data.write_text(yaml.safe_dump({"path": str(folder / "web"), "seq_len": 64, "build": build}))
    alone = load_data(data, [f"path={folder}/alone"])
    expected = build_dataset(BuildRequest.of_data(alone, workers=1)).manifest
    assert expected is not None

    array, close = submit(rack, data, "--tasks=4", "--at-once=1")
    rack.on_login("scancel", f"{array}_3", close)
    found: list[str] = []

    def building() -> list[str]:
        shown = rack.on_login("pgrep", "-f", f"rxt_dist data build .*{folder}.* --task 0", check=False)
        found[:] = shown.stdout.split()
        return found

    wait("the first task", building)
    rack.on_login("kill", "-KILL", found[-1])
    wait("its end", lambda: not rack.on_login("squeue", "-h", "-j", array, check=False).stdout.strip(), 120)
    outputs = sorted(folder.glob(f"web.job/0001/slurm-{array}_*.out"))
    assert [path.name[-5:] for path in outputs] == ["0.out", "1.out", "2.out"]
    assert not (folder / "web/dataset.json").exists()

    _, close = submit(rack, data, "--tasks=3")
    wait("the closing job", lambda: not rack.on_login("squeue", "-h", "-j", close, check=False).stdout.strip(), 120)
    shown = rack.on_login("scontrol", "-o", "show", "job", close).stdout
    assert "JobState=COMPLETED" in shown
    assert load_manifest(folder / "web").root_digest == expected.root_digest
