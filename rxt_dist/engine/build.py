"""Which engine runs a configuration, and every switch about speed and memory, in one visible list."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.interface import Engine, Stage
from rxt_dist.model.reactive import ReactiveTransformer


def start_ranks(world_size: int, local_rank: int, plain: bool) -> torch.device:
    """Choose this rank's device and join the process group (NCCL on GPUs, gloo on CPU)."""
    cuda = torch.cuda.is_available()
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not plain:
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
        assert dist.get_world_size() == world_size
    return device


def build_engine(stage: Stage, model: ReactiveTransformer, config: RunConfig, device: torch.device) -> Engine:
    """The engine of `config.parallel`, with recomputation switched on in the model where it is asked for."""
    model.decoder.recompute = config.train.recompute
    if model.encoder is not None:
        model.encoder.recompute = config.train.recompute
    if config.parallel.engine == "plain":
        from rxt_dist.engine.plain import PlainEngine

        return PlainEngine(stage, config.train, config.optimizer, device)
    if config.parallel.zero == 0:
        from rxt_dist.engine.replicated import ReplicatedEngine

        return ReplicatedEngine(stage, config, device)
    from rxt_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine(stage, config, device)
