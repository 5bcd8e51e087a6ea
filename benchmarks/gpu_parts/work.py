"""Models, batches and engines of the measurements: the published shapes, or tiny ones of the same structure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gpu_parts.device import Device
from rxt_dist.config.load import load_run
from rxt_dist.config.run import RunConfig
from rxt_dist.data.loader import TokenBatch, token_batch
from rxt_dist.data.rows import SPECIAL_COUNT
from rxt_dist.stages.base import Stage, Work, build_network, stage_class

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
LEARNING_RATE = 1e-4
# Lengths of documents: log-normal with a median of 500 tokens (in short rows a quarter), cut at the end of a row.
_MEDIAN, _LOG_SPREAD = 500, 1.1
# What a dry run makes of the shapes: the same parts.
TINY = (
    "vocab_size=512",
    "dim=64",
    "heads=8",
    "layers=1",
    "seq_len=256",
    "stm_slots=16",
    "decoder.self_attention.query_heads=4",
    "decoder.self_attention.kv_heads=2",
    "decoder.cross_attention.query_heads=4",
    "decoder.cross_attention.kv_heads=2",
    "decoder.moe.experts=8",
    "decoder.moe.active=2",
    "decoder.moe.hidden=32",
    "decoder.dense_hidden=96",
    "encoder.attention.query_heads=4",
    "encoder.attention.kv_heads=4",
    "encoder.hidden=96",
)
TINY_TOKENS = 128


@dataclass(frozen=True)
class Shape:
    """A model file and how its rows are packed; what a dry run makes of it."""

    name: str
    model: str
    tokens: int
    tiny: tuple[str, ...] = TINY


BETA = Shape("RxT-Beta", "rxt-beta.yaml", 8192, (*TINY, "decoder.moe.shared_hidden=48"))
MICRO = Shape("RxT-Beta-Micro", "rxt-beta-micro.yaml", 1024)
NANO = Shape("RxT-Alpha-Nano", "rxt-alpha-nano.yaml", 256)


def row_tokens(shape: Shape, device: Device) -> int:
    """Tokens of a row."""
    return TINY_TOKENS if device.dry else shape.tokens


def configuration(shape: Shape, device: Device, *changes: str, layers: int | None = None) -> RunConfig:
    """A run of joint pre-training in bfloat16; `changes` as on the command line."""
    model = [f"model={CONFIGS / 'model' / shape.model}", *(f"model.{change}" for change in shape.tiny if device.dry)]
    if layers is not None and not device.dry:
        model.append(f"model.layers={layers}")
    train = f"{{total_tokens: 1e12, global_batch_tokens: {row_tokens(shape, device)}, precision: bfloat16}}"
    fixed = ["optimizer={}", "seed=0", "stage={kind: joint}", f"train={train}", "parallel={engine: plain, zero: 0}"]
    # Nothing here needs memory attention, whose groups need not divide a smaller number of layers.
    return load_run(CONFIGS / "run/demo.yaml", [*model, "model.memory_attention=null", *fixed, *changes])


def make_stage(config: RunConfig, device: Device) -> Stage:
    """The stage with random weights, made on the device: on the host RxT-Beta's alone would take half a minute."""
    with device.device:
        network = build_network(config)
    std = (5 * config.model.dim) ** -0.5
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name == "embedding.weight":
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.normal_(0.0, std)
            else:
                parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
    return stage_class(config)(network, config)


def lengths(generator: np.random.Generator, tokens: int) -> list[int]:
    """Lengths of the documents of one full row."""
    found: list[int] = []
    while sum(found) < tokens:
        length = int(generator.lognormal(math.log(min(_MEDIAN, tokens / 4)), _LOG_SPREAD))
        found.append(min(max(1, length), tokens - sum(found)))
    return found


def batch(config: RunConfig, tokens: int, rows: int, number: int = 0, packed: bool = True) -> TokenBatch:
    """Batch `number` of rows with random ids, of packed documents or of one document each."""
    generator = np.random.default_rng(number)
    ids_RT = generator.integers(SPECIAL_COUNT, config.model.vocab_size, (rows, tokens)).astype(np.uint16)
    documents = [lengths(generator, tokens) if packed else [tokens] for _ in range(rows)]
    return token_batch(
        torch.from_numpy(ids_RT.view(np.int16)),
        np.array([len(one) for one in documents]),
        np.array([length for one in documents for length in one]),
        np.zeros(rows, np.int64),
        np.arange(rows, dtype=np.int64) + number * rows,
    )


def operations(config: RunConfig, micro: Any) -> int:
    """Floating-point operations of a step on one micro-batch (rxt_dist/model/flops.py)."""
    work = Work(micro.tokens, micro.pairs, {"mlm": float(micro.masked_P.numel())})
    return stage_class(config).flops(config, work)


def set_recompute(stage: Stage, recompute: bool) -> None:
    """Whether layers are recomputed in the backward pass, from now on."""
    for part in (stage.model.encoder, stage.model.decoder):
        assert isinstance(part, nn.Module)
        part.recompute = recompute
