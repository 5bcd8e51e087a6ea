"""A chain whose process is asked to end, and killed: the same command goes on, to the same weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from training_run import TinyRun, build_interaction_shards, build_shards

from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.train.events import read_lines

pytestmark = [pytest.mark.faults, pytest.mark.slow]

# The verb itself would check the chain first, in a process that loads torch.
_PIPELINE = """
import sys
from pathlib import Path
from launch.pipeline import Options, Pipeline
from rxt_dist.config.chain import load_chain
sys.exit(Pipeline(load_chain(Path(sys.argv[1])), Options(ranks=1)).run())
"""


def chain_file(folder: Path) -> Path:
    documents = build_shards(folder / "documents")
    single = build_interaction_shards(folder / "single", documents / "tokenizer.json")
    run = TinyRun(folder, documents, 8).content()
    sft = {"run": run | {"name": "sft", "data": run["data"] | {"path": str(single)}, "stage": {"kind": "sft"}}}
    file = folder / "chain.yaml"
    content = {
        "name": "chain",
        "output": str(folder / "runs"),
        "links": {"joint": {"run": run | {"name": "joint"}}, "sft": sft},
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def started(file: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-c", _PIPELINE, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def wait_for_a_step(run: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 60
    while not read_lines(run / "metrics.jsonl"):
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.02)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        return process.wait(120), process.communicate()[0]
    finally:
        process.kill()


def checksum(run: Path) -> object:
    store = CheckpointStore(run / "checkpoints", MIN_KEEP)
    return store.read(store.steps()[-1]).meta["state_checksum"]


def test_a_chain_that_is_asked_to_end_and_killed_goes_on(tmp_path: Path) -> None:
    file = chain_file(tmp_path)
    joint, sft = tmp_path / "runs/joint", tmp_path / "runs/sft"
    process = started(file)
    wait_for_a_step(joint, process)
    process.send_signal(signal.SIGTERM)
    code, output = ended(process)
    assert code == 75, output
    assert not sft.exists()
    process = started(file)
    wait_for_a_step(sft, process)
    process.kill()
    process.wait(60)
    code, output = ended(started(file))
    assert code == 0, output
    assert "link 1 of 2, 'joint': is finished" in output
    assert checksum(joint) != checksum(sft)
