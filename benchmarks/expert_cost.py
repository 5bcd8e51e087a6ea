"""What many small experts cost beside few large ones, at the same active parameters per token.

    python benchmarks/expert_cost.py [--tokens 8192] [--rounds 5]

Forward and backward of one MoE feed-forward layer of width 512, router included, shared experts left out: 8 experts of
1,920 with 1 active against RxT-Beta's 384 experts of 192 with 10 active. Either way a token passes 2.95M expert
parameters; 384 experts hold 9.6 times as many in all. The two alternate in one process. Prints a table and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from rxt_dist.config.load import load_model
from rxt_dist.engine.build import keep_freed_memory
from rxt_dist.model.moe import MoEFeedForward

MODEL = Path(__file__).resolve().parent.parent / "configs/model/rxt-beta.yaml"
# Experts, active, hidden width.
FEW, MANY = (8, 1, 1920), (384, 10, 192)


def layer(experts: int, active: int, hidden: int, dtype: torch.dtype) -> MoEFeedForward:
    """A layer with random weights of the scale that training starts from."""
    moe = {"experts": experts, "active": active, "hidden": hidden, "shared_experts": 0, "shared_hidden": 0}
    built = MoEFeedForward(load_model(MODEL, [f"decoder.moe.{name}={value}" for name, value in moe.items()]))
    for name, parameter in built.named_parameters():
        torch.nn.init.normal_(parameter, std=0.02 if "experts" in name else 1 / 512**0.5)
    return built.to(dtype)


def seconds(module: MoEFeedForward, x_BTD: Tensor) -> float:
    """Time of one forward and backward; gradients are new tensors, as in training."""
    module.zero_grad()
    x_BTD = x_BTD.detach().requires_grad_()
    direction = torch.ones_like(x_BTD)
    began = time.perf_counter()
    out_BTD, _ = module(x_BTD)
    out_BTD.backward(direction)
    return time.perf_counter() - began


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each, after one not counted (default 5)")
    arguments = parser.parse_args()
    keep_freed_memory()  # As a training run on CPU does.
    results = []
    print("| precision | 8 experts, microseconds a token | 384 experts | ratio |\n|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        modules = [layer(*shape, dtype) for shape in (FEW, MANY)]
        taken: list[list[float]] = [[], []]
        for _ in range(1 + arguments.rounds):
            x_BTD = torch.randn(1, arguments.tokens, 512).to(dtype)
            for module, times in zip(modules, taken, strict=True):
                times.append(seconds(module, x_BTD) / arguments.tokens * 1e6)
        few, many = (statistics.median(times[1:]) for times in taken)
        precision = str(dtype).removeprefix("torch.")
        print(f"| {precision} | {few:.1f} | {many:.1f} | {many / few:.2f} |")
        results.append({"precision": precision, "tokens": arguments.tokens, "few_us": few, "many_us": many})
    print(json.dumps(results))


if __name__ == "__main__":
    main()
