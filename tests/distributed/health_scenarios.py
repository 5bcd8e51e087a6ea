"""What gloo ranks do in the tests of health: they skip, go back, compare copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from harness import RankContext
from resume_scenarios import _engine, _steps
from scenarios import LR, Poison, rank_share, release

from rxt_dist.checkpoint.state import load_state, save_state, state_checksum
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.engine.expert_parallel import is_expert
from rxt_dist.errors import DivergedError
from rxt_dist.ranks import Ranks as ProcessRanks
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest


def look_again(context: RankContext, topologies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A gradient that is NaN on the last rank in one step: what a second look finds, and how training goes on."""
    results = []
    for topology in topologies:
        engine, _, stage, config = _engine(context, topology)
        _steps(context, engine, stage, config, range(1))
        poison = Poison(stage)
        poison.active = context.rank == context.world_size - 1
        micros = rank_share(context, stage, config.train.micro_batch_rows, 1)
        skipped = engine.train_step(micros, dict.fromkeys(stage.rates(0), LR))
        found = engine.inspect(micros)
        poison.active = False
        nothing = engine.inspect(micros)
        record = _steps(context, engine, stage, config, range(2, 4))
        results.append(
            {
                "applied": skipped.applied,
                "found": found and [found.layer, found.backward, found.micro],
                "nothing": nothing is None,
                "record": record,
            }
        )
        release(engine)
    return results


def blow_up(context: RankContext, topologies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A learning rate of 1e30: updates are skipped, each with the layer where it began, and nothing crashes; then
    the state of before is loaded into the living engine, and training goes on as it did."""
    results = []
    for number, topology in enumerate(topologies):
        engine, frozen, stage, config = _engine(context, topology)
        store = CheckpointStore(context.folder / f"store{number}", 2)
        _steps(context, engine, stage, config, range(2))
        save_state(engine, frozen, store, 2, {})
        before = state_checksum(engine, frozen)
        wanted = _steps(context, engine, stage, config, range(2, 4))
        skipped, layers = 0, []
        for step in range(4, 7):
            micros = rank_share(context, stage, config.train.micro_batch_rows, step)
            result = engine.train_step(micros, dict.fromkeys(stage.rates(0), 1e30))
            if not result.applied:
                skipped += 1
                found = engine.inspect(micros)
                layers.append(found and found.layer)
        load_state(engine, frozen, store.read(2), 2)
        loaded = state_checksum(engine, frozen)
        again = _steps(context, engine, stage, config, range(2, 4))
        results.append({"skipped": skipped, "layers": layers, "loaded": loaded == before, "equal": again == wanted})
        release(engine)
    return results


def flip_a_bit(context: RankContext, topologies: list[dict[str, Any]], victim: int) -> list[dict[str, Any]]:
    """Which ranks differ before and after one bit of one weight of `victim` is flipped, dense or of an expert."""
    results = []
    for topology in topologies:
        engine, _, stage, config = _engine(context, topology)
        _steps(context, engine, stage, config, range(1))
        found = {"before": engine.differing_ranks()}
        for kind, expert in (("dense", False), ("expert", True)):
            if topology["zero"] == 3 and expert:
                continue
            flipped = _flip(engine, expert) if context.rank == victim else None
            found[kind] = engine.differing_ranks()
            if flipped is not None:
                flipped.bitwise_xor_(1)
        found["after"] = engine.differing_ranks()
        results.append(found)
        release(engine)
    return results


def _flip(engine: Any, expert: bool) -> torch.Tensor:
    """Flip the lowest bit of a weight; the weight, as whole numbers."""
    if hasattr(engine, "zero") and engine.config.parallel.zero == 3:
        parameter = engine.zero.persistent_parameters[0]
    else:
        named = engine.named if hasattr(engine, "named") else dict(engine.wrapper.named_parameters())
        held = getattr(engine, "masters", named)
        split = engine.expert_parallel > 1
        wanted = [name for name, p in named.items() if (is_expert(p) if split else ".routed." in name) is expert]
        parameter = held[wanted[0]]
    word = parameter.data.view(-1)[:1].view(torch.int32)
    word.bitwise_xor_(1)
    return word


def train_a_run(context: RankContext, file: str, overrides: list[str]) -> str:
    """Train a run as a rank of it; what it ended with."""
    config = load_run(Path(file), overrides)
    with StopRequest(Path(file).with_name("STOP")) as stop:
        try:
            return train(config, ProcessRanks(context.rank, context.world_size, context.rank), stop).name
        except DivergedError as error:
            return str(error)
