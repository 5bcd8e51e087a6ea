"""What a model or a run will need, computed from its configuration without building anything.

Parameters and traffic of collectives are exact for what they state; memory of activations, step time and days are
estimates and are called so in every output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from rxt_dist.checkpoint.interval import SaveCost, best_interval, lost_share, measured_cost
from rxt_dist.config.model import AttentionConfig, ModelConfig
from rxt_dist.config.run import RunConfig
from rxt_dist.config.schedules import count_steps
from rxt_dist.model.count import (
    Count,
    count_parameters,
    count_system,
    local_moe_parameters,
)
from rxt_dist.stages.base import build_network, stage_class
from rxt_dist.train.events import EventLog

_FLOAT32_BYTES = 4
_SECONDS_PER_DAY = 86400
# Python and its libraries, measured on CPU; a CUDA context, which is not measured here, takes its place on a GPU.
_PROCESS_BYTES = 400_000_000
# Where no data says how long rows are, steps are counted in tokens: a batch of whole rows has as many of either.
_ANY_ROW = 1
ZERO_STAGES = (0, 1, 2, 3)


def plan_model(model: ModelConfig) -> dict[str, Any]:
    """`parameters`: total and active ones of each part, and of the system with its embedding counted once."""
    counts: dict[str, Count] = {**count_parameters(model), "system": count_system(model)}
    return {
        "model": model.name,
        "parameters": {part: {"total": count.total, "active": count.active} for part, count in counts.items()},
    }


def plan_run(config: RunConfig) -> dict[str, Any]:
    """The model's plan, and memory, traffic, operations and time of the run on its cluster."""
    seq_len = config.data.seq_len or config.model.seq_len
    built = run_parameters(config)
    return {
        "run": config.name,
        **plan_model(config.model),
        "trained_parameters": {"dense": built.dense, "routed_experts": built.routed},
        "frozen_parameters": built.frozen_dense + built.frozen_routed,
        "batch": _batch(config, seq_len),
        "memory_per_gpu_bytes": {f"zero_{stage}": memory_per_gpu(config, stage, seq_len) for stage in ZERO_STAGES},
        "traffic_per_gpu_per_step_bytes": {
            f"zero_{stage}": traffic_per_step(config, stage, seq_len) for stage in ZERO_STAGES
        },
        "time": _time(config, seq_len),
        "checkpoint": _checkpoint(config, seq_len),
        "assumptions": _assumptions(config, seq_len),
    }


@dataclass(frozen=True)
class Parameters:
    """Parameters that a run builds, exactly: routed experts, which expert parallelism divides, and all others."""

    dense: int
    routed: int
    frozen_dense: int
    frozen_routed: int


def run_parameters(config: RunConfig) -> Parameters:
    """What the run's stage builds, trained and frozen."""
    with torch.device("meta"):
        model = build_network(config)
    counts = dict.fromkeys(((routed, frozen) for routed in (False, True) for frozen in (False, True)), 0)
    for name, parameter in model.named_parameters():
        counts[".routed.experts." in name, config.stage.rate_group(name) is None] += parameter.numel()
    return Parameters(counts[False, False], counts[True, False], counts[False, True], counts[True, True])


def memory_per_gpu(config: RunConfig, stage: int, seq_len: int) -> dict[str, Any]:
    """Bytes on one GPU under ZeRO `stage`.

    A parameter takes its weight (2 bytes in bfloat16, else 4), a float32 gradient (4), and two moments (8) with, in
    bfloat16, a float32 master weight (4). Stage 1 divides the last over the ranks that hold copies, stage 2 also the
    gradient, stage 3 also the weight; a frozen parameter takes its weight alone. Dense parameters have a copy on every
    rank; of the routed experts a rank holds 1 / expert_parallel, with ranks / expert_parallel copies of it.

    `activations_estimate` counts the tensors that the backward pass needs for one micro-batch, `gathered_estimate` the
    whole weights of two layers, which stage 3 holds while it computes if experts have more than one copy, and
    `reduced_estimate` the gradients of one layer and the float32 copy in which they are summed, reduced or applied.
    `process_estimate` is what a process takes before it has a model.
    """
    element = _element_bytes(config)
    layer = local_moe_parameters(config.model, config.parallel.expert_parallel)
    states = {"weights": 0.0, "gradients": 0.0, "optimizer": 0.0}
    for parameters, frozen, copies in _by_copies(config):
        states["weights"] += (parameters + frozen) * element / (copies if stage >= 3 else 1)
        states["gradients"] += parameters * _FLOAT32_BYTES / (copies if stage >= 2 else 1)
        kept = (2 if element == _FLOAT32_BYTES else 3) * _FLOAT32_BYTES
        states["optimizer"] += parameters * kept / (copies if stage >= 1 else 1)
    memory: dict[str, Any] = {name: round(value) for name, value in states.items()}
    memory["activations_estimate"] = activation_bytes(config, seq_len)
    gathered = stage == 3 and config.cluster.ranks > config.parallel.expert_parallel
    memory["gathered_estimate"] = 2 * layer * element if gathered else 0
    memory["reduced_estimate"] = layer * (element + _FLOAT32_BYTES)
    memory["process_estimate"] = _PROCESS_BYTES
    memory["total_estimate"] = sum(memory.values())
    memory["fits_estimate"] = memory["total_estimate"] <= config.cluster.gpu_memory_gb * 1e9
    return memory


def _by_copies(config: RunConfig) -> list[tuple[int, int, int]]:
    """(trained, frozen, copies) of what one GPU holds: dense parameters, and its share of the routed experts."""
    ranks, experts_over = config.cluster.ranks, config.parallel.expert_parallel
    built = run_parameters(config)
    copies = max(1, ranks // experts_over)
    return [
        (built.dense, built.frozen_dense, ranks),
        (built.routed // experts_over, built.frozen_routed // experts_over, copies),
    ]


def _element_bytes(config: RunConfig) -> int:
    return 2 if config.train.precision == "bfloat16" else _FLOAT32_BYTES


def activation_bytes(config: RunConfig, seq_len: int) -> int:
    """Estimate of what one micro-batch stores for its backward pass.

    Every layer stores the tensors that its matrix products and products of tensors read; with recomputation only its
    input, and one layer at a time the rest. Beside the layers: the encoder's outputs as the decoder's memory (clean and
    noised) where both are built, and float32 logits with their gradient for one chunk of positions.
    """
    model, train, parts = config.model, config.train, config.stage.parts()
    layers = []
    if "decoder" in parts:
        layers += [_decoder_layer_width(model, stateful=True)] * model.layers
        layers += [_decoder_layer_width(model, stateful=False)] * (model.decoder_layers - model.layers)
    if model.encoder is not None and "encoder" in parts:
        encoder_layer = _attention_width(model, model.encoder.attention) + 2 * model.dim + 3 * model.encoder.hidden
        layers += [encoder_layer] * model.layers
    width = len(layers) * model.dim + max(layers) if train.recompute else sum(layers)
    if "encoder" in parts and "decoder" in parts:
        width += 2 * model.layers * model.dim
    tokens = train.micro_batch_rows * seq_len
    logits = 2 * _FLOAT32_BYTES * min(train.logit_chunk_tokens, tokens) * model.vocab_size
    return tokens * width * _element_bytes(config) + logits


def _attention_width(model: ModelConfig, attention: AttentionConfig) -> int:
    """Numbers per token: normed input, q, k, v, heads' output, gate."""
    width = attention.query_heads * model.head_dim
    return 2 * model.dim + (3 if attention.gated else 2) * width + 2 * attention.kv_heads * model.head_dim


def _decoder_layer_width(model: ModelConfig, stateful: bool) -> int:
    """Numbers per token: attention, and K visited experts with input, gate and up halves, product, output."""
    moe = model.decoder.moe
    routed = moe.active * (2 * model.dim + 3 * moe.hidden)
    shared = moe.shared_experts * (model.dim + 3 * moe.shared_hidden)
    cross = _attention_width(model, model.decoder.cross_attention) if stateful else 0
    return _attention_width(model, model.decoder.self_attention) + cross + 2 * model.dim + routed + shared


@dataclass(frozen=True)
class Exchanged:
    """Bytes that the collectives of one optimizer step run over on a rank, for parameters with equally many copies.

    copies: ranks that hold the same parameters.
    gradients, weights: whole buffers, each counted once for a reduce-scatter or all-gather and twice for an all-reduce.
    """

    copies: int
    gradients: int
    weights: int


def exchanged(config: RunConfig, stage: int, seq_len: int) -> tuple[Exchanged, Exchanged]:
    """What ZeRO `stage` reduces and gathers of the dense parameters, and of a rank's share of the routed experts.

    Stage 0 all-reduces float32 gradients; stage 1 reduce-scatters them and gathers the new weights; stage 2
    reduce-scatters in every micro-batch; stage 3 also gathers the weights twice in every micro-batch (forward and
    backward) and not after the step.
    """
    accumulation = _batch(config, seq_len)["micro_batches_per_step"]
    reductions = {0: 2, 1: 1, 2: accumulation, 3: accumulation}[stage]
    gathers = {0: 0, 1: 1, 2: 1, 3: 2 * accumulation}[stage]
    dense, routed = (
        Exchanged(
            copies,
            parameters * _FLOAT32_BYTES * reductions,
            (parameters + (frozen if stage == 3 else 0)) * _element_bytes(config) * gathers,
        )
        for parameters, frozen, copies in _by_copies(config)
    )
    return dense, routed


def all_to_all_bytes(config: RunConfig) -> float:
    """Bytes of a GPU's tokens that one optimizer step hands to the exchange between experts; of them the share
    (ep - 1) / ep leaves the GPU.

    Each token's K visited copies of D numbers go out and back, in forward and backward, and once more forward when
    layers are recomputed.
    """
    model, crossings = config.model, 6 if config.train.recompute else 4
    tokens = config.train.global_batch_tokens / config.cluster.ranks
    copies_per_token = model.moe_layers * model.decoder.moe.active * crossings
    return tokens * copies_per_token * model.dim * _element_bytes(config)


def traffic_per_step(config: RunConfig, stage: int, seq_len: int) -> dict[str, int]:
    """Bytes that one GPU sends per optimizer step: a reduce-scatter or all-gather of n bytes over g ranks sends
    n * (g - 1) / g, an all-to-all the same."""
    parts = exchanged(config, stage, seq_len)
    experts_over = config.parallel.expert_parallel
    return {
        "gradients": round(sum(part.gradients * (part.copies - 1) / part.copies for part in parts)),
        "weights": round(sum(part.weights * (part.copies - 1) / part.copies for part in parts)),
        "expert_all_to_all": round(all_to_all_bytes(config) * (experts_over - 1) / experts_over),
    }


def _batch(config: RunConfig, seq_len: int) -> dict[str, int]:
    rows = config.train.global_batch_tokens // seq_len
    return {
        "seq_len": seq_len,
        "global_rows": rows,
        "ranks": config.cluster.ranks,
        "micro_batches_per_step": max(1, rows // (config.cluster.ranks * config.train.micro_batch_rows)),
        "steps": count_steps(config.train, config.data.seq_len or _ANY_ROW),
    }


def _time(config: RunConfig, seq_len: int) -> dict[str, float]:
    """Operations of a step (each row one document, which is the most that attention can cost) at the assumed MFU."""
    tokens = config.train.global_batch_tokens
    stage = stage_class(config)
    step = stage.flops(config, stage.expected_work(config, tokens, seq_len))
    speed = config.cluster.ranks * config.cluster.peak_tflops * 1e12 * config.cluster.mfu
    seconds = step / speed
    return {
        "flops_per_token": step / tokens,
        "flops_per_step": step,
        "step_seconds_estimate": seconds,
        "tokens_per_second_estimate": tokens / seconds,
        "days_estimate": seconds * config.train.total_tokens / tokens / _SECONDS_PER_DAY,
    }


def _checkpoint(config: RunConfig, seq_len: int) -> dict[str, Any]:
    """Size of a checkpoint, what a save costs (measured, where the run has saved already), and how often to save."""
    built = run_parameters(config)
    trained, frozen = built.dense + built.routed, built.frozen_dense + built.frozen_routed
    size = _FLOAT32_BYTES * (3 * trained + frozen)
    found = measured_cost(EventLog(config.directory / "events.jsonl").read())
    copied = _FLOAT32_BYTES * 3 * trained / config.cluster.ranks
    cluster = config.cluster
    cost = found or SaveCost(
        copied / (cluster.host_copy_gb_s * 1e9), size / (cluster.nodes * cluster.disk_write_gb_s * 1e9)
    )
    between = cluster.hours_between_failures * 3600 / cluster.nodes
    best = best_interval(cost, between)
    tokens_s = _time(config, seq_len)["tokens_per_second_estimate"]
    own = config.checkpoint.every_tokens / tokens_s
    return {
        "bytes": size,
        "host_memory_per_rank_bytes": round(copied),
        "cost": "measured" if found else "estimate",
        "stall_seconds": cost.stall,
        "written_seconds": cost.written,
        "hours_between_failures": between / 3600,
        "best_interval_seconds": best,
        "best_interval_tokens_estimate": round(best * tokens_s),
        "lost_share_at_best": lost_share(cost, between, best),
        "own_interval_seconds_estimate": own,
        "lost_share_at_own_estimate": lost_share(cost, between, max(own, cost.written)),
    }


def _assumptions(config: RunConfig, seq_len: int) -> list[str]:
    cluster = config.cluster
    chosen = f"ZeRO {config.parallel.zero}, expert parallel {config.parallel.expert_parallel}"
    length = "" if config.data.seq_len else " (the model's; data.seq_len is not set)"
    return [
        f"{cluster.ranks} GPUs of {cluster.gpu_memory_gb:g} GB; the run itself uses {chosen}",
        f"rows of {seq_len} tokens{length}, each one document",
        f"{cluster.peak_tflops:g} TFLOP/s peak per GPU at {cluster.mfu:.0%} utilisation (assumed, not measured)",
        "activations are an estimate; allocator fragmentation is not in it",
    ]
