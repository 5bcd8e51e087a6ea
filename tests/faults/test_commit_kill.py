"""A process that saves in a loop is killed at random moments; what was committed must always be there."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rxt_dist.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.faults

KILLS = 15
# Reports each commit after it has returned, so the parent knows a step that must survive.
WRITER = """
import hashlib, sys
from pathlib import Path
from rxt_dist.checkpoint.store import CheckpointStore

store = CheckpointStore(Path(sys.argv[1]), keep=2)
newest = store.latest_valid(print)
step = newest.step if newest else 0
while True:
    step += 1
    folder = store.begin(step)
    records = []
    for rank in range(3):
        path = folder / f"rank-{rank}.bin"
        path.write_bytes(hashlib.sha256(f"{step} {rank}".encode()).digest() * 4096)
        records.append(store.record(path))
    store.commit(step, records, {"tokens": step * 1000})
    print("committed", step, flush=True)
"""


def life(directory: Path, seconds: float) -> tuple[int, list[str]]:
    """Start the writer, kill it `seconds` after its first commit; the last step it reported, and what else it said."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(directory)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert writer.stdout is not None
    output = writer.stdout.readline()
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    output += writer.communicate()[0]
    assert writer.returncode == -signal.SIGKILL
    # What follows the last line's end was torn by the kill: print writes a text and its end in two calls.
    lines = output.split("\n")[:-1]
    reported = [int(line.split()[1]) for line in lines if line.startswith("committed ")]
    return reported[-1], [line for line in lines if not line.startswith("committed ")]


def test_a_kill_at_any_moment_loses_nothing_committed(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoints"
    rng = random.Random(7)
    before = 0
    left_unfinished = 0
    for _ in range(KILLS):
        reported, said = life(directory, rng.uniform(0.0, 0.25))
        assert said == []
        store = CheckpointStore(directory, keep=2)
        checkpoint = store.latest_valid(pytest.fail)
        assert checkpoint is not None
        # The kill may fall between the commit and its report, never further away.
        assert reported <= checkpoint.step <= reported + 1
        assert checkpoint.step > before
        assert checkpoint.meta == {"tokens": checkpoint.step * 1000}
        require_content(checkpoint.path, checkpoint.step)
        infos = store.list()
        sound = [info for info in infos if info.committed and not store.verify(info.step)]
        assert len(sound) >= min(2, checkpoint.step)
        left_unfinished += any(not info.committed for info in infos)
        before = checkpoint.step
    # Otherwise the kills fell outside of saves and proved nothing.
    assert left_unfinished > 0


def require_content(folder: Path, step: int) -> None:
    """Compare with what must have been written, not with what the manifest says was written."""
    import hashlib

    for rank in range(3):
        expected = hashlib.sha256(f"{step} {rank}".encode()).digest() * 4096
        assert (folder / f"rank-{rank}.bin").read_bytes() == expected
