"""The joint step as a whole: swept to the memory limit, by kernel, by engine, and at the smaller shapes."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gpu_parts.context import Context
from gpu_parts.device import fitting
from gpu_parts.work import (
    BETA,
    LEARNING_RATE,
    MICRO,
    NANO,
    Shape,
    batch,
    configuration,
    make_stage,
    operations,
    row_tokens,
    set_recompute,
)
from rxt_dist.config.run import RunConfig
from rxt_dist.engine.build import build_engine, choose_kernels, compiles
from rxt_dist.engine.interface import Engine
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.engine.routing import routed_blocks
from rxt_dist.losses import objective
from rxt_dist.model.fused import compile_chains
from rxt_dist.stages.base import Stage

WARMUP, TIMED = 2, 3
ROWS = (1, 2, 4, 8, 16)
# Layers tried for engines that may not fit with all of them.
DEPTHS = (21, 12, 6, 3)
BEST = "beta_best"
# A step takes less than this; with less time left no further one is tried.
_ENOUGH_SECONDS = 20
_DRY_LIMIT = 2
_TOP, _NAME = 10, 90


@contextmanager
def built(context: Context, config: RunConfig) -> Iterator[tuple[Engine, Stage]]:
    """An engine and its stage; their memory is free afterwards."""
    device = context.device
    device.free()
    device.forget_peak()
    stage = make_stage(config, device)
    engine = build_engine(stage, config, device.device)
    try:
        yield engine, stage
    finally:
        engine.close()
        del engine, stage
        device.free()


def measure(
    context: Context, engine: Engine, stage: Stage, shape: Shape, rows: int, packed: bool = True
) -> dict[str, Any]:
    """Medians over some steps, preparation of the batch included, as the training loop runs them.

    Raises:
        torch.OutOfMemoryError: so many rows do not fit.
    """
    device, config = context.device, stage.run
    if device.dry and rows > _DRY_LIMIT:
        raise torch.OutOfMemoryError("a dry run has room for two rows")
    tokens = row_tokens(shape, device)
    device.forget_peak()
    times, done, real, losses = [], 0, 0, []

    def step(number: int) -> None:
        nonlocal done, real
        micro = stage.prepare(batches[number], number * rows * tokens)
        done, real = operations(config, micro), micro.tokens
        result = engine.train_step([micro], dict.fromkeys(stage.rates(0), LEARNING_RATE))
        losses.append((result.totals.sums_J / result.totals.counts_J)[0].item() if result.applied else float("nan"))

    warmup, timed = (1, 1) if device.dry else (WARMUP, TIMED)
    count = warmup + timed
    batches = [batch(config, tokens, rows, number, packed) for number in range(count + 1)]
    for number in range(count):
        times.append(device.wall_milliseconds(lambda number=number: step(number)))
    milliseconds = statistics.median(times[warmup:])
    waits = device.waits(lambda: step(count))
    return {
        "layers": config.model.layers,
        "tokens/s": real / milliseconds * 1e3,
        "step ms": milliseconds,
        "MFU (measured peak)": context.share_of_peak(done / milliseconds * 1e3),
        "MFU (datasheet)": done / milliseconds * 1e3 / context.fact("bf16_flops_datasheet", float("nan")),
        "TFLOP": done / 1e12,
        "first step ms": times[0],
        "peak GB": device.peak_gb(),
        "waits a step": waits,
        "loss": losses[-1],
    }


def sweep(context: Context) -> None:
    """RxT-Beta on the plain engine: rows of a micro-batch and recomputation, to the memory limit."""
    for layers in DEPTHS:
        with fitting(context.device) as outcome:
            _sweep(context, layers)
        if not outcome:
            return
        context.row(layers=layers, **{"tokens/s": f"{outcome[0]}: the model with its optimizer"})


def _sweep(context: Context, layers: int) -> None:
    best = 0.0
    with built(context, configuration(BETA, context.device, layers=layers)) as (engine, stage):
        assert isinstance(engine, PlainEngine)
        parameters = sum(parameter.numel() for parameter in stage.parameters()) / 1e9
        context.note(f"{stage.run.model.layers} layers: {parameters:.3f} billion parameters")
        # The first step makes the optimizer's moments; what does not fit then fits with no number of rows.
        measure(context, engine, stage, BETA, 1)
        full: set[bool] = set()
        for rows, recompute in product(ROWS, (True, False)):
            if context.seconds_left < _ENOUGH_SECONDS:
                context.note("no time for more")
                return
            if recompute in full:
                continue
            set_recompute(stage, recompute)
            cells = _setting(context, engine, stage, {"rows": rows, "recompute": recompute})
            if cells is None:
                full.add(recompute)
            elif cells["tokens/s"] > best:
                best = cells["tokens/s"]
                kept = {"layers": layers, "rows": rows, "recompute": recompute, "tokens/s": round(best)}
                context.report.fact(BEST, kept)
        _uncompiled(context, engine, stage)


def _setting(context: Context, engine: PlainEngine, stage: Stage, setting: dict[str, Any]) -> dict[str, Any] | None:
    """A row of the sweep; None where it does not fit."""
    cells = dict(setting)
    with fitting(context.device) as full:
        cells |= measure(context, engine, stage, BETA, setting["rows"])
    if full:
        context.row(**setting, **{"tokens/s": full[0]})
        # A step that was broken off left gradients behind.
        stage.zero_grad()
        engine.optimizer.zero_grad()
        return None
    context.row(**cells)
    return cells


def _uncompiled(context: Context, engine: PlainEngine, stage: Stage) -> None:
    """The best setting again without torch.compile."""
    best = context.fact(BEST)
    if best is None or not compiles(stage.run, context.device.device) or context.seconds_left < _ENOUGH_SECONDS:
        return
    set_recompute(stage, best["recompute"])
    compile_chains(None)
    _setting(context, engine, stage, {"rows": best["rows"], "recompute": best["recompute"], "compiled": False})
    choose_kernels(stage.run, context.device.device)


def kernels(context: Context) -> None:
    """The largest costs of the best step of the sweep, by kernel."""
    best = context.fact(BEST)
    if best is None:
        context.note("nothing to look into: no step of the sweep fitted")
        return
    device = context.device
    with built(context, configuration(BETA, device, layers=best["layers"])) as (engine, stage):
        set_recompute(stage, best["recompute"])
        tokens, rows = row_tokens(BETA, device), best["rows"]
        micros = [stage.prepare(batch(stage.run, tokens, rows, number), 0) for number in range(3)]
        rates = dict.fromkeys(stage.rates(0), LEARNING_RATE)
        for micro in micros[:2]:
            engine.train_step([micro], rates)
        device.synchronize()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.cuda else [])]
        with profile(activities=activities) as profiler:
            wall = device.wall_milliseconds(lambda: engine.train_step([micros[2]], rates))
        averages = profiler.key_averages()
    if device.cuda:
        costs = [
            (event.self_device_time_total, event)
            for event in averages
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    else:
        costs = [(event.self_cpu_time_total, event) for event in averages]
    costs.sort(key=lambda cost: -cost[0])
    total = sum(cost for cost, _ in costs) or 1.0
    for cost, event in costs[:_TOP]:
        context.row(kernel=event.key[:_NAME], ms=cost / 1e3, share=cost / total, calls=event.count)
    context.note(f"rows {rows}, recompute {best['recompute']}: {wall:.1f} ms by the clock with the profiler on")
    context.note(f"kernels together {total / 1e3:.1f} ms, {sum(e.count for _, e in costs):,} calls")


def zero(context: Context, stage: int) -> None:
    """RxT-Beta, one row, recomputed, on one device with DeepSpeed; with fewer layers where all of them do not fit."""
    start_group(context)
    parallel = f"parallel={{engine: deepspeed, zero: {stage}, expert_parallel: 1}}"
    for layers in DEPTHS:
        for name, changes in ((f"ZeRO {stage}", (parallel,)), ("plain", ())):
            with fitting(context.device) as outcome:
                context.row(engine=name, **_one_row(context, layers, *changes))
            if outcome:
                context.row(engine=name, layers=layers, **{"tokens/s": outcome[0]})
                break
        else:
            return
        if context.seconds_left < _ENOUGH_SECONDS:
            context.note("no time for fewer layers")
            return


def _one_row(context: Context, layers: int, *changes: str) -> dict[str, Any]:
    """In a function of its own, so that its engine is gone when it ends."""
    config = configuration(BETA, context.device, "train.recompute=true", *changes, layers=layers)
    with built(context, config) as (engine, stage):
        return measure(context, engine, stage, BETA, 1)


def start_group(context: Context) -> None:
    """A process group of this process alone."""
    if torch.distributed.is_initialized():
        return
    if not context.device.cuda:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    backend = "nccl" if context.device.cuda else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def autoep(context: Context) -> None:
    """Forward and backward with our routed block, and with DeepSpeed's AutoEP in its place (one rank, six layers)."""
    start_group(context)
    for block in ("ours", "AutoEP"):
        with fitting(context.device) as outcome:
            context.row(block=block, **_passes(context, block == "AutoEP"))
        if outcome:
            context.row(block=block, ms=outcome[0])


def _passes(context: Context, with_autoep: bool) -> dict[str, Any]:
    device = context.device
    config = configuration(BETA, device, layers=6)
    choose_kernels(config, device.device)
    stage = make_stage(config, device)
    layers = len(routed_blocks(stage.model))
    if with_autoep:
        from rxt_dist.engine.deepspeed import install_expert_parallel

        install_expert_parallel(stage, config)
    stage.to(device.device, torch.bfloat16)
    micro = stage.prepare(batch(config, row_tokens(BETA, device), 1), 0).to(device.device)
    counts_J, weights_J = stage.counts(micro).float().to(device.device), stage.weights().to(device.device)
    experts = config.model.decoder.moe.experts
    load_ME = torch.full((layers, experts), 1 / experts, device=device.device)

    def passes() -> None:
        objective(stage(micro, load_ME).sums_J, counts_J, weights_J).backward()
        stage.zero_grad()

    return {"ms": device.milliseconds(passes, rounds=5), "waits": device.waits(passes), "MoE layers": layers}


def small_shapes(context: Context) -> None:
    """Micro and Nano on the plain engine."""
    for shape, counts in ((MICRO, (16, 64)), (NANO, (64, 256))):
        for rows in (1, 2) if context.device.dry else counts:
            with fitting(context.device) as outcome:
                context.row(shape=shape.name, rows=rows, **_small(context, shape, rows))
            if outcome:
                context.row(shape=shape.name, rows=rows, **{"tokens/s": outcome[0]})


def _small(context: Context, shape: Shape, rows: int) -> dict[str, Any]:
    with built(context, configuration(shape, context.device)) as (engine, stage):
        return measure(context, engine, stage, shape, rows)
