"""The plan of a model or of a run.

Parameters, operations and traffic of collectives are exact for what they state; memory, step time, days and cost are
estimates and are called so in every output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from rxt_dist.checkpoint.interval import SaveCost, best_interval, lost_share, measured_cost
from rxt_dist.config.load import load_run
from rxt_dist.config.model import ModelConfig
from rxt_dist.config.run import RunConfig
from rxt_dist.config.schedules import count_steps
from rxt_dist.errors import ConfigError
from rxt_dist.model.count import Count, count_parameters, count_system
from rxt_dist.plan.memory import memory_per_gpu
from rxt_dist.plan.setting import FLOAT32_BYTES, Setting
from rxt_dist.plan.settings import plan_settings
from rxt_dist.plan.traffic import traffic_per_step
from rxt_dist.report.records import JsonLines, number
from rxt_dist.stages.work import arithmetic

_HOURS_PER_DAY = 24
_SECONDS_PER_DAY = 86400
# Where no data says how long rows are, steps are counted in tokens: a batch of whole rows has as many of either.
_ANY_ROW = 1
# Log lines that the measured utilisation is the median of.
_MEASURED_LINES = 50
ZERO_STAGES = (0, 1, 2, 3)


def plan_model(model: ModelConfig) -> dict[str, Any]:
    """`parameters`: total and active ones of each part, and of the system with its embedding counted once."""
    counts: dict[str, Count] = {**count_parameters(model), "system": count_system(model)}
    return {
        "model": model.name,
        "parameters": {part: {"total": count.total, "active": count.active} for part, count in counts.items()},
    }


@dataclass(frozen=True)
class Measured:
    """What the run has shown on this very cluster; None where it has not.

    mfu: median utilisation of its last log lines.
    """

    mfu: float | None
    save: SaveCost | None


def measured(config: RunConfig) -> Measured:
    """Read it from the run directory; figures of another cluster say nothing here."""
    try:
        there = load_run(config.directory / "config.resolved.yaml").cluster
    except ConfigError:
        return Measured(None, None)
    if there != config.cluster:
        return Measured(None, None)
    lines = JsonLines(config.directory / "metrics.jsonl").read()[1]
    found = [value for line in lines[-_MEASURED_LINES:] if (value := number(line.get("mfu"))) > 0]
    events = JsonLines(config.directory / "events.jsonl").read()[1]
    return Measured(median(found) if found else None, measured_cost(events))


def plan_run(config: RunConfig) -> dict[str, Any]:
    """The model's plan; memory, traffic, operations, time and cost of the run on its cluster; all valid settings.

    Args:
        config: its expert_parallel is settled.
    """
    own, shown = Setting.of(config), measured(config)
    built = own.built
    flops = _flops(own)
    time = _time(own, flops, shown)
    saves = _checkpoint(own, time["tokens_per_second_estimate"], shown)
    return {
        "run": config.name,
        "cluster": config.cluster.name,
        **plan_model(config.model),
        "trained_parameters": {"dense": built.dense, "routed_experts": built.routed},
        "frozen_parameters": built.frozen_dense + built.frozen_routed,
        "batch": _batch(own),
        "memory_per_gpu_bytes": {f"zero_{stage}": _memory(own.with_(zero=stage)) for stage in ZERO_STAGES},
        "traffic_per_gpu_per_step_bytes": {
            f"zero_{stage}": traffic_per_step(own.with_(zero=stage)) for stage in ZERO_STAGES
        },
        "flops_per_token": {part: count / config.train.global_batch_tokens for part, count in flops.items()},
        "time": time,
        "settings": plan_settings(own, time["step_seconds_estimate"], flops),
        "checkpoint": saves,
        "cost": _cost(config, time, saves),
        "assumptions": _assumptions(own, time),
    }


def _memory(setting: Setting) -> dict[str, Any]:
    memory = memory_per_gpu(setting)
    return memory.items() | {"fits_estimate": memory.fits(setting.config.cluster.gpu_memory_gb)}


def _batch(setting: Setting) -> dict[str, int]:
    config = setting.config
    return {
        "seq_len": setting.seq_len,
        "global_rows": setting.rows,
        "ranks": config.cluster.ranks,
        "micro_batches_per_step": setting.accumulation,
        "steps": count_steps(config.train, config.data.seq_len or _ANY_ROW),
    }


def _flops(setting: Setting) -> Mapping[str, int]:
    """Operations of a step by part, each row one document, which is the most that attention can cost."""
    config, stage = setting.config, arithmetic(setting.config)
    work = stage.expected_work(config, config.train.global_batch_tokens, setting.seq_len)
    return stage.flops_by_part(config, work)


def _time(setting: Setting, flops: Mapping[str, int], shown: Measured) -> dict[str, Any]:
    """Time at the utilisation that the run has shown on this cluster, else at that which the cluster file assumes."""
    train, cluster = setting.config.train, setting.config.cluster
    step, mfu = sum(flops.values()), shown.mfu or cluster.mfu
    seconds = step / (cluster.ranks * cluster.peak_tflops * 1e12 * mfu)
    return {
        "mfu": mfu,
        "mfu_source": "measured" if shown.mfu else "assumed",
        "flops_per_token": step / train.global_batch_tokens,
        "flops_per_step": step,
        "step_seconds_estimate": seconds,
        "tokens_per_second_estimate": train.global_batch_tokens / seconds,
        "days_estimate": seconds * train.total_tokens / train.global_batch_tokens / _SECONDS_PER_DAY,
    }


def _checkpoint(setting: Setting, tokens_s: float, shown: Measured) -> dict[str, Any]:
    """Size of a checkpoint, what a save costs (measured, where the run has saved already), and how often to save."""
    config, built, cluster = setting.config, setting.built, setting.config.cluster
    trained, frozen = built.dense + built.routed, built.frozen_dense + built.frozen_routed
    size = FLOAT32_BYTES * (3 * trained + frozen)
    copied = FLOAT32_BYTES * 3 * trained / cluster.ranks
    cost = shown.save or SaveCost(
        copied / (cluster.host_copy_gb_s * 1e9), size / (cluster.nodes * cluster.disk_write_gb_s * 1e9)
    )
    between = cluster.hours_between_failures * 3600 / cluster.nodes
    best = best_interval(cost, between)
    own = config.checkpoint.every_tokens / tokens_s
    return {
        "bytes": size,
        "host_memory_per_rank_bytes": round(copied),
        "cost": "measured" if shown.save else "estimate",
        "stall_seconds": cost.stall,
        "written_seconds": cost.written,
        "hours_between_failures": between / 3600,
        "best_interval_seconds": best,
        "best_interval_tokens_estimate": round(best * tokens_s),
        "lost_share_at_best": lost_share(cost, between, best),
        "own_interval_seconds_estimate": own,
        "lost_share_at_own_estimate": lost_share(cost, between, max(own, cost.written)),
    }


def _cost(config: RunConfig, time: Mapping[str, Any], saves: Mapping[str, Any]) -> dict[str, float | None]:
    """GPU-hours of the token budget with what saves and failures take at the run's own interval; US dollars where the
    cluster file states a price."""
    kept = max(1 - saves["lost_share_at_own_estimate"], 1e-3)
    days = time["days_estimate"] / kept
    hours = days * _HOURS_PER_DAY * config.cluster.ranks
    price = config.cluster.gpu_hour_price
    return {
        "days_with_losses_estimate": days,
        "gpu_hours_estimate": hours,
        "usd_estimate": hours * price if price else None,
    }


def _assumptions(setting: Setting, time: Mapping[str, Any]) -> list[str]:
    cluster = setting.config.cluster
    length = "" if setting.config.data.seq_len else " (the model's; data.seq_len is not set)"
    source = "measured in this run" if time["mfu_source"] == "measured" else "assumed, not measured"
    price = f" at {cluster.gpu_hour_price:g} dollars an hour (cluster file)" if cluster.gpu_hour_price else ""
    return [
        f"{cluster.ranks} GPUs of {cluster.gpu_memory_gb:g} GB{price}; the run itself uses {setting.name}",
        f"rows of {setting.seq_len} tokens{length}, each one document",
        f"{cluster.peak_tflops:g} TFLOP/s peak per GPU at {time['mfu']:.0%} utilisation ({source})",
        "memory but for weights and optimizer is an estimate; fragmentation on a GPU is not in it",
    ]
