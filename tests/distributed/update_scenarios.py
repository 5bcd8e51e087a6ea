"""What gloo ranks do in the test of several updates of a batch, made after a look at the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from harness import RankContext
from scenarios import EPS, LR, canonical, config_of, release
from tiny import ROWS, TOKENS, batch_for, make_stage
from torch import Tensor

from rxt_dist.engine.build import build_engine
from rxt_dist.stages.base import Batch, MicroBatch, Reading, Stage


def look_and_update(context: RankContext, topology: dict[str, Any], steps: int) -> dict[str, Any]:
    """Steps of a stage that calls its whole model without gradients and makes two updates of each batch.

    Of each step: the sums of the losses that it saw, and of its updates; and the whole state at the end.
    """
    if topology.get("engine") != "plain":
        torch.distributed.init_process_group("gloo")
    config = config_of(context, eps=EPS, stage="lm", **topology)
    stage = make_stage(config)
    shapes = {name: list(p.shape) for name, p in stage.model.named_parameters() if p.requires_grad}
    engine = build_engine(stage, config, torch.device("cpu"))
    seen: list[Tensor] = []
    stage.updates = _twice(stage, seen)  # type: ignore[method-assign]
    updates = []
    for step in range(steps):
        trained = step * ROWS * TOKENS
        parts = batch_for(config, step).micro_batches(config.train.micro_batch_rows)
        share = len(parts) // context.world_size
        mine = parts[context.rank * share : (context.rank + 1) * share]
        rates = {group: LR * factor for group, factor in stage.rates(trained).items()}
        for micros in stage.updates(mine, trained, engine.reading):
            updates.append(engine.train_step(micros, rates).totals.sums_J)
    result = {
        "seen": engine.ranks.sum(torch.stack(seen)),
        "updates": torch.stack(updates),
        "state": canonical(engine, shapes)[0],
    }
    release(engine)
    return result if context.rank == 0 else {}


def _twice(stage: Stage, seen: list[Tensor]) -> Any:
    layers, experts = stage.model.config.moe_layers, stage.model.config.decoder.moe.experts

    def updates(parts: Sequence[Batch], trained: int, reading: Reading) -> Iterator[list[MicroBatch]]:
        micros = [stage.prepare(part, trained) for part in parts]
        with reading():
            outputs = [stage(micro, torch.zeros(layers, experts)) for micro in micros]
        assert not any(output.sums_J.requires_grad for output in outputs)
        seen.append(sum(output.sums_J[0].double() for output in outputs))
        yield micros
        yield micros

    return updates
