"""A whole run by the command line: data, training, evaluation, checkpoint, profile, and a second start that resumes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from place import DEVICE, DRY

pytest.importorskip("pyarrow", reason="shards need pyarrow, which is not installed here")

from training_run import STEP_TOKENS, TinyRun, build_shards

STEPS = 6
ENGINES = {
    "plain": ("parallel.engine=plain", "parallel.zero=0"),
    "zero1": ("parallel.engine=deepspeed", "parallel.zero=1"),
    "zero3": ("parallel.engine=deepspeed", "parallel.zero=3"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shards(tmp_path_factory.mktemp("data"))


def rxt_dist(*arguments: str) -> str:
    """The output of a command that must end well."""
    # Not the group of this process, where other tests have made one.
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    ours = {name: value for name, value in os.environ.items() if name not in group}
    environment = ours | ({"DS_ACCELERATOR": "cpu"} if DRY else {})
    command = [sys.executable, "-m", "rxt_dist", *arguments]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


@pytest.mark.parametrize("engine", ["plain"] if DRY else ENGINES)
def test_a_run(engine: str, shards: Path, tmp_path: Path) -> None:
    run = TinyRun(tmp_path, shards, STEPS)
    changes = [*ENGINES[engine], "train.precision=bfloat16", f"checkpoint.every_tokens={2 * STEP_TOKENS}"]
    # To write down a step takes the CPU four seconds, and is tested there (tests/train/test_profile.py).
    profile = () if DRY else ("--profile", "2")
    output = rxt_dist("train", str(run.file), *profile, *changes)
    assert f"device: {DEVICE.type}, bfloat16" in output
    steps = [line for line in run.lines() if "ar_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert all(math.isfinite(line["ar_loss"]) and math.isfinite(line["grad_norm"]) for line in steps)
    assert any(name.startswith("eval/") for line in run.lines() for name in line)
    assert DRY or run.events("profile")
    assert len(run.events("save")) >= 2
    # Another process, for seconds, of what the CPU does in many other tests.
    assert DRY or "finished" in rxt_dist("train", str(run.file), *changes)
