"""Training steps of the tiny model on a device, for comparison with other devices and engines."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from tiny import ROWS, TOKENS, make_stage, packed_batch, run_config
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.build import build_engine
from rxt_dist.engine.interface import Engine, at_once
from rxt_dist.stages import joint
from rxt_dist.stages.base import Stage

LR = 1e-2
# Large enough that a gradient of rounding noise does not become a whole Adam step.
EPS = 1e-5


class Record(NamedTuple):
    """What a step gave. losses: means of all terms."""

    losses: list[float]
    grad_norm: float
    experts_ME: Tensor


def prepared(**changes: Any) -> tuple[Stage, RunConfig]:
    """A freshly initialised stage of the tiny model; `changes` as in `run_config`."""
    config = run_config(micro_batch_rows=ROWS, **({"eps": EPS} | changes))
    return make_stage(config), config


def train(
    engine: Engine,
    stage: Stage,
    steps: Sequence[int],
    accumulation: int = 1,
    before_update: Callable[[], None] = at_once,
) -> list[Record]:
    """Train on these global batches, all of them in this process."""
    records = []
    for step in steps:
        parts = packed_batch(step).micro_batches(ROWS // accumulation)
        micros = [stage.prepare(part, step * ROWS * TOKENS) for part in parts]
        result = engine.train_step(micros, dict.fromkeys(stage.rates(0), LR), before_update)
        assert result.applied, f"step {step}: {result.reason}"
        totals = result.totals
        losses = (totals.sums_J / totals.counts_J).tolist()
        records.append(Record(losses, result.grad_norm, result.expert_counts_ME.clone()))
    return records


@contextmanager
def engine_on(device: torch.device, **changes: Any) -> Any:
    """(engine, stage) of the tiny model; freed at the end."""
    stage, config = prepared(**changes)
    engine = build_engine(stage, config, device)
    try:
        yield engine, stage
    finally:
        engine.close()
        del engine, stage
        gc.collect()


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the memory's noise on the CPU: generators of CPU and CUDA differ, and here all else is compared."""
    original = joint.cheated_context

    def on_cpu(encoded_LBTD: Tensor, *levels: Any) -> Tensor:
        # Not compiled: kernels for the CPU would be made with it.
        with monkeypatch.context() as plain:
            plain.setattr(joint, "_cheated", joint._cheated.eager)
            return original(encoded_LBTD.cpu(), *levels).to(encoded_LBTD.device)

    monkeypatch.setattr(joint, "cheated_context", on_cpu)
