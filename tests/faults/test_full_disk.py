"""A disk without room during a save, of a real run: training goes on, and saves once there is room again."""

from __future__ import annotations

import resource
import subprocess
from contextlib import suppress

import pytest
from training_run import TinyRun, build_shards, run, start

pytestmark = pytest.mark.faults

STEPS = 25
# Files that grow beyond this are refused: more than the metrics of this run, less than its weights.
ROOM = 60_000


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return build_shards(tmp_path_factory.mktemp("data"))


def limit(process, size: int) -> None:
    """The system refuses larger files of a running process from now on; it may be lifted again."""
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def wait_for_failure(tiny: TinyRun, process) -> None:
    from faults.test_training import wait_for

    wait_for(lambda: tiny.events("save_failed"), process)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, shards):
    undisturbed = TinyRun(tmp_path_factory.mktemp("undisturbed"), shards, STEPS)
    run(undisturbed.train_command())
    return undisturbed


def test_training_goes_on_and_saves_once_there_is_room(tmp_path, shards, undisturbed):
    tiny = TinyRun(tmp_path, shards, STEPS)
    process = start(tiny.train_command())
    limit(process, ROOM)
    wait_for_failure(tiny, process)
    limit(process, resource.RLIM_INFINITY)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "File too large" in tiny.events("save_failed")[0]["error"]
    assert tiny.events("save")[-1]["step"] == STEPS
    assert tiny.curve() == undisturbed.curve()
    weights = [one.directory / f"checkpoints/step-{STEPS:08d}/rank-00000.safetensors" for one in (tiny, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of eight megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_full_to_the_last_byte_costs_lines_at_most(tmp_path, shards, small_disk, undisturbed):
    from faults.test_training import wait_for, wait_for_step

    tiny = TinyRun(tmp_path, shards, STEPS)
    (tmp_path / "runs").symlink_to(small_disk)
    process = start(tiny.train_command())
    wait_for_step(tiny, 2, process)
    filler = small_disk / "filler"
    with suppress(OSError), open(filler, "wb", 0) as file:
        while True:
            file.write(bytes(4096))
    wait_for(lambda: "save_failed" in process.output, process)
    filler.unlink()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert tiny.events("save")[-1]["step"] == STEPS
    # Of a block that was begun there is still room for a line, so that none need be lost.
    assert set(tiny.curve()) <= set(undisturbed.curve())
    assert len(tiny.curve()) + sum(event["lines"] for event in tiny.events("lines_lost")) >= STEPS
    weights = [one.directory / f"checkpoints/step-{STEPS:08d}/rank-00000.safetensors" for one in (tiny, undisturbed)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_run_that_cannot_save_its_end_says_that_the_disk_is_full(tmp_path, shards):
    tiny = TinyRun(tmp_path, shards, STEPS)
    process = start(tiny.train_command())
    limit(process, ROOM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 74, output
    assert "File too large" in output
    assert [event["retry_s"] for event in tiny.events("save_failed")][-2:] == [1.0, 5.0]
    assert len(tiny.curve()) == STEPS
    assert not list((tiny.directory / "checkpoints").glob("step-*"))
