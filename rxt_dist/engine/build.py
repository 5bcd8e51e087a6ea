"""Which engine runs a configuration, and every switch about speed and memory, in one visible list."""

from __future__ import annotations

import ctypes
import gc
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.compiler import find_compiler
from rxt_dist.engine.grouped_product import choose_grouped_product, triton_product
from rxt_dist.engine.interface import Engine
from rxt_dist.engine.materialise import materialise
from rxt_dist.engine.rendezvous import join_ranks
from rxt_dist.errors import ConfigError
from rxt_dist.lasting import lasting_imports
from rxt_dist.model.experts import set_grouped_product
from rxt_dist.model.fused import compile_chains
from rxt_dist.stages.base import Stage

# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# Blocks from this size on, the largest that glibc takes, are given back to the system when they are freed.
_LARGE_BYTES = 32 << 20
# A last resort against ranks that wait for ever.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


def choose_device(local_rank: int) -> torch.device:
    """This rank's GPU, or the CPU on a machine without any.

    Raises:
        ConfigError: fewer GPUs than ranks on this machine.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
        return torch.device("cpu")
    found = torch.cuda.device_count()
    if local_rank >= found:
        raise ConfigError(
            f"Rank {local_rank} of this machine needs a GPU of its own, but {found} can be seen here. Start at most "
            f"{found} ranks, or hide all GPUs (CUDA_VISIBLE_DEVICES= ) to train on the CPU."
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next step, on CPU, in blocks of up to 32 MB.

    By default it gives blocks from some hundred KB on back to the system, and every step takes them anew at 4 GB/s, a
    page fault at a time; memory in use moves at 40. Larger blocks are better given back: kept ones get split by what is
    asked for in between, and where parameters are large the process then grows by gigabytes (docs/scale.md).

    All threads share one heap: gloo's copy what they reduce, and each would keep a heap of its own for that.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # Other C libraries have no such function.
        mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_ARENA_MAX, 1)


def _return_freed_memory() -> None:
    """Give back to the system what making an engine has used and freed: copies of all that it holds."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


@contextmanager
def joined_ranks(device: torch.device, plain: bool, timeout: timedelta = COLLECTIVE_TIMEOUT) -> Iterator[Collectives]:
    """The process group of this run while the block lasts; none for engine 'plain'.

    Args:
        timeout: see `join_ranks`.
    """
    # DeepSpeed calls collectives by names that torch 2.13 renames; nothing a user can act on.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
    if not plain:
        join_ranks(device, timeout)
    try:
        yield Collectives(device)
    finally:
        # A rank that leaves its group standing dies at exit with a code of its own.
        if dist.is_initialized():
            dist.destroy_process_group()


def describe_kernels(config: RunConfig, device: torch.device) -> list[str]:
    """One line per choice of kernel and memory that does not depend on the engine, for the start banner."""
    train = config.train
    fast = device.type == "cuda" and train.precision == "bfloat16"
    attention = "variable-length flash attention" if fast else "scaled_dot_product_attention, by document or masked"
    triton = fast and choose_grouped_product(device) is triton_product
    grouped = f"one grouped product ({'DeepSpeed, Triton' if triton else 'torch._grouped_mm'})"
    own = grouped if fast else "a loop of products in one autograd function"
    experts = "AutoEP's" if config.parallel.expert_parallel > 1 else own
    router = "float32 on TF32 tensor cores" if fast else "float32"
    routed = [f"experts: {experts}; router in {router}"] if "decoder" in config.stage.parts() else []
    return [
        f"device: {device.type}, {train.precision}",
        f"kernels: attention {attention}; cross-entropy in chunks of {train.logit_chunk_tokens}",
        f"norms, rotations, gates, routing, losses: {_compiled(config, device)}",
        *routed,
        f"activations: {'recomputed layer by layer' if train.recompute else 'kept'}",
    ]


def compiles(config: RunConfig, device: torch.device) -> bool:
    """Whether chains of operations are compiled in a run.

    Raises:
        ConfigError: they are to be, and this machine has no compiler.
    """
    wanted = config.train.compile
    if wanted == "off" or (wanted == "auto" and device.type != "cuda"):
        return False
    if find_compiler():
        return True
    if wanted == "on":
        raise ConfigError("train.compile is on, but this machine has no C compiler. Install gcc, or set it to auto.")
    return False


def _compiled(config: RunConfig, device: torch.device) -> str:
    if compiles(config, device):
        return "compiled by inductor"
    return f"not compiled ({'train.compile' if config.train.compile == 'off' else 'no GPU, or no C compiler'})"


def choose_kernels(config: RunConfig, device: torch.device) -> None:
    """What this process computes with from here on: `describe_kernels` says it in words."""
    if device.type == "cuda" and config.train.precision == "bfloat16":
        # The router's float32 products then run on tensor cores. Its inputs are bfloat16 values, which TF32 holds
        # exactly; only the gradient of its logits is rounded, to eleven bits.
        torch.set_float32_matmul_precision("high")
        set_grouped_product(choose_grouped_product(device))
    compile_chains("inductor" if compiles(config, device) else None)


def build_engine(stage: Stage, config: RunConfig, device: torch.device) -> Engine:
    """The engine of `config.parallel`.

    Args:
        stage: its network has weights, or none yet (on the meta device): then they are undefined until they are written
            into the engine's fragments.
    """
    choose_kernels(config, device)
    with lasting_imports():
        engine_class = _engine_class(config)
    _make_room(stage, config, device)
    engine = engine_class(stage, config, device)
    if device.type == "cpu":
        _return_freed_memory()
    return engine


def _engine_class(config: RunConfig) -> Callable[[Stage, RunConfig, torch.device], Engine]:
    if config.parallel.engine == "plain":
        from rxt_dist.engine.plain import PlainEngine

        return PlainEngine
    if config.parallel.zero == 0:
        from rxt_dist.engine.replicated import ReplicatedEngine

        return ReplicatedEngine
    from rxt_dist.engine.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine


def _make_room(stage: Stage, config: RunConfig, device: torch.device) -> None:
    divide = None
    if config.parallel.zero == 3 and any(parameter.is_meta for parameter in stage.model.parameters()):
        from rxt_dist.engine.deepspeed import ZeroDivision

        divide = ZeroDivision(config, device)
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
    materialise(stage.model, device, dtype, config.parallel.expert_parallel > 1, divide)
