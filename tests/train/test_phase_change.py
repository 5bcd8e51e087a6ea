"""A run that goes on with a phase of another dataset; blocks of the order are 16 rows here, so that it takes steps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from training_run import SEQ_LEN, STEP_TOKENS, TinyRun, build_shards

from data_prep.documents.build import BuildRequest, build_dataset
from rxt_dist.config import phases
from rxt_dist.config.load import load_run
from rxt_dist.data import mixture, sampler
from rxt_dist.errors import DataError, ExitCode
from rxt_dist.ranks import Ranks
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

BLOCK, STEPS = 16, 6
EVERY_STEP = (f"checkpoint.every_tokens={STEP_TOKENS}", "checkpoint.keep=20", "eval.rows_per_source=1")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (phases, mixture, sampler):
        monkeypatch.setattr(module, "BLOCK", BLOCK)
    monkeypatch.setattr(sampler, "_SLOTS", np.arange(BLOCK))


def trained(tiny: TinyRun, *overrides: str) -> ExitCode:
    config = load_run(tiny.file, [*EVERY_STEP, *overrides])
    return train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP"))


def back_to(tiny: TinyRun, step: int) -> None:
    """As if the run had been killed right after the checkpoint of a step."""
    for path in (tiny.directory / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for name in ("events.jsonl", "finished.json"):
        (tiny.directory / name).unlink(missing_ok=True)


def weights(tiny: TinyRun) -> dict[str, bytes]:
    (newest,) = (tiny.directory / "checkpoints").glob(f"step-{STEPS:08d}")
    tensors = {}
    for path in sorted(newest.rglob("*.safetensors")):
        tensors |= {f"{path.name} {name}": tensor.numpy().tobytes() for name, tensor in load_file(path).items()}
    return tensors


def mixture_of(other: Path, first_steps: int) -> str:
    first = {"tokens": first_steps * STEP_TOKENS, "by_size": True}
    return "data.mixture=" + json.dumps([first, {"path": str(other), "by_size": True}])


@pytest.mark.slow
def test_a_run_goes_on_with_another_dataset_where_nothing_of_it_was_read(tmp_path: Path) -> None:
    """From step 2 on, as a run that had the phase from the beginning; from step 3 on only after step 4."""
    shards = build_shards(tmp_path)
    (tmp_path / "more").mkdir()
    for number in range(40):
        (tmp_path / f"more/{number}.txt").write_text(f"quite another text, number {number * 77} of them. " * 30)
    other = tmp_path / "other"
    tokenizer = shards / "tokenizer.json"
    build_dataset(BuildRequest((tmp_path / "more",), other, tokenizer, SEQ_LEN, eval_fraction=0.1, workers=1))
    (tmp_path / "planned").mkdir()
    planned, changed = TinyRun(tmp_path / "planned", shards, STEPS), TinyRun(tmp_path, shards, STEPS)
    assert trained(planned, mixture_of(other, 2)) == ExitCode.DONE
    assert trained(changed) == ExitCode.DONE
    alone = weights(changed)

    back_to(changed, 3)
    with pytest.raises(DataError, match=f"at {4 * STEP_TOKENS:,} tokens or later"):
        trained(changed, mixture_of(other, 2))
    with pytest.raises(DataError, match="the shards are not the ones training began with"):
        trained(changed, f"data.path={other}")
    back_to(changed, 2)
    assert trained(changed, mixture_of(other, 2)) == ExitCode.DONE
    (change,) = (event["setting"] for event in changed.events("changed") if "mixture" in event["setting"])
    assert str(other) in change
    assert weights(changed) == weights(planned) != alone
    assert changed.curve() == planned.curve()
    evaluated = {key.split("/")[1] for line in changed.lines() for key in line if key.startswith("eval/")}
    assert {name for name in evaluated if name.endswith("@2")}

    back_to(changed, 4)
    (newest,) = (changed.directory / "checkpoints").glob("step-00000004")
    data = json.loads((newest / "manifest.json").read_text())["meta"]["data"]
    assert len(data["dataset_digests"]) == 2
    with pytest.raises(DataError, match="is now"):
        trained(changed)
