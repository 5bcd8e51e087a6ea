"""Which engine runs a configuration, and every switch about speed and memory, in one visible list."""

from __future__ import annotations

import os
import warnings

import torch
import torch.distributed as dist

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.interface import Engine, Stage
from rxt_dist.model.reactive import ReactiveTransformer


def start_ranks(world_size: int, local_rank: int, plain: bool) -> torch.device:
    """Choose this rank's device and join the process group (NCCL on GPUs, gloo on CPU)."""
    # DeepSpeed calls collectives by names that torch 2.13 renames; nothing a user can act on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
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


def describe_kernels(config: RunConfig, device: torch.device) -> list[str]:
    """One line per choice of kernel and memory that does not depend on the engine, for the start banner."""
    train = config.train
    fast = device.type == "cuda" and train.precision == "bfloat16"
    attention = "variable-length flash attention" if fast else "scaled_dot_product_attention, by document or masked"
    own = "one grouped product (torch._grouped_mm)" if fast else "a loop of products in one autograd function"
    experts = "AutoEP's" if config.parallel.expert_parallel > 1 else own
    return [
        f"device: {device.type}, {train.precision}",
        f"kernels: attention {attention}; experts {experts}; cross-entropy in chunks of {train.logit_chunk_tokens}",
        f"activations: {'recomputed layer by layer' if train.recompute else 'kept'}",
    ]


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
