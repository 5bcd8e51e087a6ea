"""What feeds the device and what it is saved by: preparing and copying a batch, and a checkpoint."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from gpu_parts.context import Context
from gpu_parts.device import fitting
from gpu_parts.steps import DEPTHS, built
from gpu_parts.work import BETA, LEARNING_RATE, batch, configuration, row_tokens
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.state import save_state, state_checksum
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.stages.base import build_network, stage_class, to_device

# Layers of the checkpoint that is written; 3 of 21 are 6 GB with their moments.
_SAVED_LAYERS = 3


def expansion(context: Context) -> None:
    """Preparing a batch on the host, and copying it to the device."""
    device, config = context.device, configuration(BETA, context.device, layers=_SAVED_LAYERS)
    with torch.device("meta"):
        network = build_network(config)
    stage = stage_class(config)(network, config)
    tokens = row_tokens(BETA, device)
    for rows in (1, 2) if device.dry else (1, 8):
        read = batch(config, tokens, rows)
        times = []
        for _ in range(5):
            began = time.perf_counter()
            micro = stage.prepare(read, 0)
            times.append((time.perf_counter() - began) * 1e3)
        size = sum(value.numel() * value.element_size() for value in vars(micro).values() if isinstance(value, Tensor))
        copy = statistics.median(
            device.wall_milliseconds(lambda micro=micro: micro.to(device.device)) for _ in range(5)
        )
        context.row(rows=rows, prepare_ms=statistics.median(times), copy_ms=copy, MB=size / 1e6)
    room = torch.empty(1 << (20 if device.dry else 28), dtype=torch.uint8)
    pinned = room.pin_memory() if device.cuda else room
    for name, source in (("pageable", room), ("pinned", pinned)):
        milliseconds = device.milliseconds(lambda source=source: source.to(device.device, non_blocking=True), rounds=5)
        context.note(f"host to device, {name}: {source.numel() / milliseconds / 1e6:.1f} GB/s")
    context.note(
        f"pinning {room.numel() >> 20} MB: {device.wall_milliseconds(lambda: to_device(room, device.device)):.1f} ms"
    )


def saving(context: Context) -> None:
    """A checkpoint of some layers of RxT-Beta: how long training stands still, and what that time is made of."""
    device = context.device
    _from_device(context)
    for layers in (depth for depth in DEPTHS if depth <= _SAVED_LAYERS):
        with fitting(device) as outcome:
            _save(context, layers)
        if outcome:
            context.note(f"{layers} layers: {outcome[0]}")


def _from_device(context: Context) -> None:
    device = context.device
    there = torch.empty(1 << (20 if device.dry else 30), dtype=torch.uint8, device=device.device)
    size = there.numel()
    for name, pinned in (("pinned", device.cuda), ("pageable", False)):
        target = torch.empty(there.shape, dtype=torch.uint8, pin_memory=pinned)
        milliseconds = device.milliseconds(lambda target=target: target.copy_(there), rounds=3, warmup=1)
        context.row(what=f"device to host, {name}", GB=size / 1e9, GB_per_s=size / milliseconds / 1e6)


def _save(context: Context, layers: int) -> None:
    device = context.device
    with built(context, configuration(BETA, device, layers=layers)) as (engine, stage):
        micro = stage.prepare(batch(stage.run, row_tokens(BETA, device), 1), 0)
        engine.train_step([micro], dict.fromkeys(stage.rates(0), LEARNING_RATE))
        frozen = FrozenWeights(stage.model, engine.ranks)
        parts = [tensor for part in engine.fragments(owned=True) for tensor in part.tensors.values()]
        size = sum(tensor.numel() * 4 for tensor in parts) / 1e9

        def copies() -> None:
            for tensor in parts:
                tensor.detach().to("cpu", copy=True)

        with tempfile.TemporaryDirectory() as folder:
            actions = {
                "copies of the state to the host": copies,
                "checksum of the state": lambda: state_checksum(engine, frozen),
                "whole save (training stands still)": lambda: save_state(
                    engine, frozen, CheckpointStore(Path(folder), 2), 1, {}
                ),
            }
            for name, action in actions.items():
                milliseconds = device.wall_milliseconds(action)
                context.row(
                    what=f"{name}, {layers} layers", GB=size, s=milliseconds / 1e3, GB_per_s=size / milliseconds * 1e3
                )
        whole = configuration(BETA, device, layers=DEPTHS[0])
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_network(whole).parameters())
        context.note(f"all {DEPTHS[0]} layers are {parameters * 12 / 1e9:.1f} GB of weights and moments")
