"""What DeepSpeed's AutoEP layer costs beside our own routed block, on CPU.

    python benchmarks/autoep_cost.py [--model configs/model/rxt-beta.yaml] [--tokens 4096] [--rounds 7]

Forward and backward of one routed block (router and experts) with equal weights on two gloo ranks of one thread each,
every rank with its own tokens, in float32 and bfloat16: ours with all experts on both ranks, AutoEP's with all experts
on both, AutoEP's with half of them on each and an all-to-all over gloo. The three alternate; a time lasts until both
ranks have ended. Prints a table and JSON. What a GPU does is not in it: AutoEP has other kernels there, and the host
waits for the device once a forward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from rxt_dist.config.load import load_model
from rxt_dist.engine.build import keep_freed_memory
from rxt_dist.model.init import initialise
from rxt_dist.model.reactive import ReactiveTransformer

MODEL = Path(__file__).resolve().parent.parent / "configs/model/rxt-beta.yaml"
RANKS = 2
SIDES = {"own": 0, "AutoEP, EP 1": 1, "AutoEP, EP 2": 2}


def block(path: Path, expert_parallel: int, dtype: torch.dtype) -> nn.Module:
    """The routed block of a model of one layer; AutoEP's where expert_parallel is not 0."""
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config

    from rxt_dist.engine.autoep import our_layers
    from rxt_dist.engine.expert_parallel import RoutedShape, autoep_config
    from rxt_dist.engine.routing import routed_blocks

    small = ["layers=1", "decoder.stateless_before=[]", "decoder.stateless_after=[]", "memory_attention="]
    config = load_model(path, small)
    wrapper, wrapper.stage, wrapper.config = nn.Module(), nn.Module(), RoutedShape.of(config)
    wrapper.stage.model = ReactiveTransformer(config, ("embedding", "decoder", "lm_head"), False)
    initialise(wrapper.stage.model, 0)
    if expert_parallel:
        builder = AutoEP(wrapper, parse_autoep_config(autoep_config(expert_parallel)))
        with our_layers():
            builder.replace_moe_layers(
                builder.ep_parser(), ep_size=expert_parallel, ep_rank=dist.get_rank() % expert_parallel
            )
    (routed,) = routed_blocks(wrapper.stage.model)
    if expert_parallel:
        routed.set_deepspeed_parallelism()
    return routed.to(dtype)


def seconds(module: nn.Module, x_BTD: Tensor) -> float:
    """Time of one forward and backward on both ranks; gradients are new tensors, as in training."""
    module.zero_grad()
    x_BTD = x_BTD.detach().requires_grad_()
    direction_BTD = torch.ones_like(x_BTD)
    dist.barrier()
    began = time.perf_counter()
    out_BTD, _ = module(x_BTD)
    out_BTD.backward(direction_BTD)
    dist.barrier()
    return time.perf_counter() - began


def be_rank(rank: int, port: int, arguments: argparse.Namespace) -> None:
    """Measure; rank 0 prints."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=RANKS)
    import deepspeed

    import rxt_dist.engine.deepspeed  # noqa: F401  (no operators of DeepSpeed's are compiled)

    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    keep_freed_memory()  # As a training run on CPU does.
    results: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        modules = [block(arguments.model, expert_parallel, dtype) for expert_parallel in SIDES.values()]
        width = modules[0].gate.in_features
        taken: list[list[float]] = [[] for _ in modules]
        for step in range(1 + arguments.rounds):
            generator = torch.Generator().manual_seed(RANKS * step + rank)
            x_BTD = torch.randn(1, arguments.tokens, width, generator=generator).to(dtype)
            for module, times in zip(modules, taken, strict=True):
                times.append(seconds(module, x_BTD) / arguments.tokens * 1e6)
        sides: dict[str, Any] = {}
        for side, times in zip(SIDES, taken, strict=True):
            ratios = [mine / own for mine, own in zip(times[1:], taken[0][1:], strict=True)]
            sides[side] = {"us": statistics.median(times[1:]), "ratio": statistics.median(ratios)}
        results.append({"precision": str(dtype).removeprefix("torch."), **sides})
    dist.destroy_process_group()
    if rank == 0:
        report(arguments, results)


def report(arguments: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    """Microseconds a token, and the median over rounds of the ratio to our own block."""
    print(f"{arguments.model.stem}, {arguments.tokens} tokens a rank, microseconds a token (ratio to our own block)")
    print(f"| precision | {' | '.join(SIDES)} |\n|---|{'---|' * len(SIDES)}")
    for result in results:
        cells = [f"{result[side]['us']:.1f} ({result[side]['ratio']:.2f})" for side in SIDES]
        print(f"| {result['precision']} | {' | '.join(cells)} |")
    print(json.dumps({"model": arguments.model.stem, "tokens": arguments.tokens, "results": results}), flush=True)


def main() -> None:
    """Parse the arguments, start the ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of each rank")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each, after one not counted")
    arguments = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    torch.multiprocessing.spawn(be_rank, (port, arguments), nprocs=RANKS)


if __name__ == "__main__":
    main()
