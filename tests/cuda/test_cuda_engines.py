"""One process, every engine: plain torch against replicas (ZeRO 0) and DeepSpeed's ZeRO 1 to 3, and the CPU."""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import pytest
import torch
from place import DEVICE, DRY
from ranks_of_gpus import expert_parallel_losses
from steps import Record, engine_on, train

# As on the CPU (tests/distributed/test_topologies.py); on a GPU some kernels add in an order that changes from run to
# run.
FLOAT32, BFLOAT16 = 1e-4, 2e-2
STEPS = 4
ALL: list[dict[str, Any]] = [
    {"zero": 0},
    {"zero": 1},
    {"zero": 2},
    {"zero": 3},
    {"zero": 1, "recompute": True, "accumulation": 2},
    {"zero": 3, "recompute": True, "accumulation": 2},
]
# On the CPU the others are tested with ranks (tests/distributed).
TOPOLOGIES = ALL[-1:] if DRY else ALL


@cache
def plain(precision: str) -> list[Record]:
    with engine_on(DEVICE, engine="plain", zero=0, precision=precision) as (engine, stage):
        return train(engine, stage, range(STEPS))


def name_of(wanted: dict[str, Any]) -> str:
    return "-".join(f"{name}{value}" for name, value in wanted.items())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", TOPOLOGIES, ids=name_of)
def test_engines_agree(wanted: dict[str, Any], precision: str, one_rank: None) -> None:
    expected = plain(precision)
    changes = {name: value for name, value in wanted.items() if name != "accumulation"}
    with engine_on(DEVICE, precision=precision, **changes) as (engine, stage):
        actual = train(engine, stage, range(STEPS), wanted.get("accumulation", 1))
    gc.collect()
    allowed = FLOAT32 if precision == "float32" else BFLOAT16
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=allowed)
        assert mine.grad_norm == pytest.approx(theirs.grad_norm, rel=5 * allowed)


@pytest.mark.skipif(not DRY and torch.cuda.device_count() < 2, reason="fewer than two GPUs")
@pytest.mark.parametrize("zero", [3] if DRY else [1, 3])
def test_experts_on_two_devices(zero: int, tmp_path: Any) -> None:
    """A process a GPU; experts split over both."""
    found = expert_parallel_losses(tmp_path, zero, STEPS)
    for mine, theirs in zip(found, plain("float32"), strict=True):
        assert mine == pytest.approx(theirs.losses, rel=FLOAT32)
