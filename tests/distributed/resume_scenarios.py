"""What gloo ranks do in the checkpoint tests: train, save, load, go on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import RankContext
from scenarios import LR, config_of, release
from tiny import batch_for, make_stage

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import load_state, save_state, state_checksum
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.engine.build import build_engine
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine, at_once
from rxt_dist.model.init import initialise

SAVED_AT = 2


def save_and_go_on(context: RankContext, directory: str, topology: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train SAVED_AT steps, save, train on to `steps`; what the last steps gave, and the checksum at the end."""
    engine, frozen, stage, config = _engine(context, topology)
    _steps(context, engine, stage, config, range(SAVED_AT))
    save_state(engine, frozen, CheckpointStore(Path(directory), 2), SAVED_AT, {"note": "test"})
    return _go_on(context, engine, frozen, stage, config, steps)


def load_and_go_on(
    context: RankContext, directory: str, topologies: list[dict[str, Any]], steps: int, shared_counter: bool = False
) -> list[dict[str, Any]]:
    """For each topology: load the checkpoint into a fresh engine with other weights and train on to `steps`.

    `shared_counter` plants the fault that DeepSpeed's own universal load has: one step counter for all states.
    """
    results = []
    for topology in topologies:
        checkpoint = CheckpointStore(Path(directory), 2).latest_valid(print)
        assert checkpoint is not None
        engine, frozen, stage, config = _engine(context, topology, seed=1)
        load_state(engine, frozen, checkpoint, SAVED_AT)
        states = list(_optimizer(engine).state.values())
        counters = {state["step"].data_ptr() for state in states}
        if shared_counter:
            for state in states:
                state["step"] = states[0]["step"]
        loaded = state_checksum(engine, frozen)
        result = _go_on(context, engine, frozen, stage, config, steps)
        groups = [(group.get("name"), group.get("moe", False)) for group in _optimizer(engine).param_groups]
        result |= {
            "loaded": loaded,
            "saved": checkpoint.meta["state_checksum"],
            "own_counters": len(counters) == len(states),
            "counts": sorted({float(state["step"]) for state in _optimizer(engine).state.values()}),
            "groups": groups,
        }
        results.append(result)
    return results


def _optimizer(engine: Engine) -> torch.optim.Optimizer:
    zero = getattr(engine, "zero", None)
    return engine.optimizer if zero is None else zero.optimizer


def _engine(context: RankContext, topology: dict[str, Any], seed: int = 0) -> tuple[Any, ...]:
    if topology.get("engine") != "plain" and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    config = config_of(context, **topology)
    stage = make_stage(config)
    initialise(stage.model, seed)  # Other initial weights, but the same masks and noise.
    frozen = FrozenWeights(stage.model, Collectives(torch.device("cpu")))
    return build_engine(stage, config, torch.device("cpu")), frozen, stage, config


def _steps(
    context: RankContext, engine: Any, stage: Any, config: Any, steps: range, before_update: Any = at_once
) -> list[list[float]]:
    records = []
    for step in steps:
        parts = batch_for(config, step).micro_batches(config.train.micro_batch_rows)
        share = len(parts) // context.world_size
        mine = parts[context.rank * share : (context.rank + 1) * share]
        rates = {group: LR * factor for group, factor in stage.rates(step * 256).items()}
        result = engine.train_step([stage.prepare(part, step * 256) for part in mine], rates, before_update)
        assert result.applied
        records.append([*(result.totals.sums_J / result.totals.counts_J.clamp_min(1)).tolist(), result.grad_norm])
    return records


def _go_on(context: RankContext, engine: Any, frozen: Any, stage: Any, config: Any, steps: int) -> dict[str, Any]:
    records = _steps(context, engine, stage, config, range(SAVED_AT, steps))
    result = {"records": records, "checksum": state_checksum(engine, frozen)}
    release(engine)
    return result
