"""A build is killed at random moments, with another number of tasks each time; the dataset must come out the same.

Half of the kills fall on a build that drops duplicates. A hundred kills: `RXT_BUILD_KILLS=100 pytest` and this file.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.synthetic import write_sample
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.data.verify import verify_full

pytestmark = pytest.mark.faults

KILLS = int(os.environ.get("RXT_BUILD_KILLS", "8"))
SCRIPT = """
import sys
from pathlib import Path
from data_prep.documents.build import BuildRequest, build_dataset
from rxt_dist.config.clean import CleanConfig
from rxt_dist.config.corpus import BuildConfig

if __name__ == "__main__":
    corpus, out, duplicates, task, tasks, workers, backend = sys.argv[1:]
    config = BuildConfig(clean=CleanConfig(exact_duplicates=duplicates == "dropped"))
    request = BuildRequest(
        (Path(corpus),), Path(out), seq_len=64, vocab_size=500, workers=int(workers), unit_bytes=8_000,
        backend=backend, task=int(task) if int(tasks) else None, tasks=int(tasks) or None, config=config,
    )
    print("started", flush=True)
    print("finished" if build_dataset(request).manifest else "left", flush=True)
"""
BACKENDS = ("tokenizers", "gigatoken" if find_spec("gigatoken") else "tokenizers")


class Array:
    """The tasks of one run of a build; 0 tasks are one plain build."""

    def __init__(self, script: Path, corpus: Path, out: Path, duplicates: str, rng: random.Random) -> None:
        tasks = rng.randint(0, 3)
        self.name = f"{tasks} tasks"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(script), str(corpus), str(out), duplicates, str(task), str(tasks),
                 str(rng.randint(1, 2)), rng.choice(BACKENDS)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
            )
            for task in range(max(tasks, 1))
        ]  # fmt: skip

    def wait_until_started(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "started\n", process.communicate()

    def wait_for_commits(self, out: Path, count: int) -> None:
        """Wait until so many more units are finished, or all tasks have ended."""
        wanted = len(list(out.glob("units/*.json"))) + count
        while len(list(out.glob("units/*.json"))) < wanted and any(p.poll() is None for p in self.processes):
            time.sleep(0.005)

    def kill(self, with_workers: bool) -> int:
        """SIGKILL to every task, with its workers or without; how many were still alive."""
        alive = [process for process in self.processes if process.poll() is None]
        for process in alive:
            if with_workers:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        return len(alive)

    def end(self) -> list[str]:
        """Wait for all, and return what they said last; errors other than being killed fail the test."""
        said = []
        for process in self.processes:
            output, errors = process.communicate(timeout=120)
            assert process.returncode in (0, -signal.SIGKILL), f"{self.name}: {errors}"
            said += output.split()[-1:]
        return said


@pytest.mark.parametrize("duplicates", ["kept", "dropped"])
def test_kills_at_any_moment_and_any_number_of_tasks_change_nothing(tmp_path: Path, duplicates: str) -> None:
    corpus, out, script = tmp_path / "corpus", tmp_path / "out", tmp_path / "build_it.py"
    write_sample(corpus, text_bytes=300_000)
    for path in sorted(corpus.rglob("*.jsonl"))[:2]:
        shutil.copy(path, path.with_name(f"zz.{path.name}"))
    script.write_text(SCRIPT)
    config = BuildConfig(clean=CleanConfig(exact_duplicates=duplicates == "dropped"))
    request = BuildRequest(
        (corpus,), tmp_path / "undisturbed", seq_len=64, vocab_size=500, workers=1, unit_bytes=8_000, config=config
    )
    expected = build_dataset(request)
    assert expected.units >= 10
    assert expected.manifest is not None
    rng = random.Random(int(os.environ.get("RXT_BUILD_SEED", "1")))
    kills = finished = kept = runs = 0

    def more() -> bool:
        """Whether there is still to kill: a kill outside of the work proves nothing, so some must fall into it."""
        return kills < KILLS / 2 or kept < max(KILLS // 8, 1)

    while more() or not finished:
        runs += 1
        assert runs < 5 * KILLS, f"{kills} kills in {runs} runs, of which {kept} left finished units behind"
        array = Array(script, corpus, out, duplicates, rng)
        array.wait_until_started()
        if more():
            if rng.random() < 0.6:  # in the middle of the units; else anywhere, the setting up included
                array.wait_for_commits(out, rng.randint(1, 8))
                time.sleep(rng.uniform(0, 0.1))
            else:
                time.sleep(rng.uniform(0, 1))
            kills += array.kill(with_workers=rng.random() < 0.7) > 0
        said = array.end()
        if not (out / "dataset.json").exists():
            kept += len(list(out.glob("units/*.json"))) > 0
            continue
        finished += 1
        result = build_dataset(BuildRequest(**{**vars(request), "out": out}))
        assert result.manifest is not None
        assert result.units_kept == expected.units, said
        assert result.manifest.root_digest == expected.manifest.root_digest
        assert verify_full(out).findings == ()
        assert not [path for path in out.rglob(".*") if ".tmp." in path.name]
        shutil.rmtree(out)
    print(f"{kills} kills, {finished} datasets finished, {kept} runs left finished units behind")
