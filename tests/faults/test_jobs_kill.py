"""kill -9 at random moments of interactions, repacking and imports, each time with other workers and tasks: the dataset
comes out as if nothing had happened.

Documents, and the duplicates among them, have their own: test_build_kill.py.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import golden_jobs
import pytest

from rxt_dist.data.verify import verify_full

pytestmark = pytest.mark.faults

KILLS_AMID_UNITS = int(os.environ.get("RXT_JOB_KILLS", "2"))
SCRIPT = """
import sys
from pathlib import Path

import golden_jobs

if __name__ == "__main__":
    kind, place, out, workers, task, tasks = sys.argv[1:]
    array = {"task": int(task), "tasks": int(tasks)} if int(tasks) else {}
    print("started", flush=True)
    golden_jobs.run(kind, Path(place), Path(out), workers=int(workers), **array)
"""


def start(script: Path, kind: str, place: Path, out: Path, rng: random.Random) -> list[subprocess.Popen[str]]:
    """One plain build, or two tasks of an array at once."""
    tasks = rng.choice((0, 0, 2))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), kind, str(place), str(out), str(rng.randint(1, 2)), str(task), str(tasks)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )
        for task in range(max(tasks, 1))
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n", process.communicate()
    return processes


def kill(processes: list[subprocess.Popen[str]], with_workers: bool) -> None:
    for process in processes:
        if process.poll() is None:
            if with_workers:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode in (0, -signal.SIGKILL), errors


@pytest.mark.parametrize("kind", ["single", "recalls", "repacked", "imported"])
def test_a_job_that_is_killed_at_any_moment_is_finished_with_the_same_dataset(tmp_path: Path, kind: str) -> None:
    place, out, script = tmp_path / "place", tmp_path / "out", tmp_path / "build_it.py"
    golden_jobs.write_inputs(place)
    script.write_text(SCRIPT)
    units = golden_jobs.run(kind, place, tmp_path / "whole").units
    rng = random.Random(1)
    amid = kept = 0
    for _ in range(15 * KILLS_AMID_UNITS):
        processes = start(script, kind, place, out, rng)
        if rng.random() < 0.8:
            wanted = len(list(out.glob("units/*.json"))) + 1
            while len(list(out.glob("units/*.json"))) < wanted and any(p.poll() is None for p in processes):
                time.sleep(0.001)
        else:
            time.sleep(rng.uniform(0, 0.5))
        kill(processes, with_workers=rng.random() < 0.7)
        kept = len(list(out.glob("units/*.json")))
        amid += 0 < kept < units
        if amid >= KILLS_AMID_UNITS and kept < units:
            break
        if kept == units:  # it ended before the kill, so the next one would find nothing to do
            shutil.rmtree(out)
    assert amid >= KILLS_AMID_UNITS, f"{amid} kills fell into the midst of {units} units"
    result = golden_jobs.run(kind, place, out, workers=2)
    assert 0 <= kept <= result.units_kept < units
    assert result.manifest is not None
    assert result.manifest.root_digest.startswith(golden_jobs.DIGESTS[kind][0])
    assert verify_full(out).findings == ()
    assert not [path for path in out.rglob(".*") if ".tmp." in path.name]
    contents = [
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "whole", out)
    ]
    assert contents[0] == contents[1]
