"""What float32 router logits change in a bfloat16 run: how many tokens choose other experts without them, and the cost.

    python benchmarks/router_precision.py

One router of the RxT-Beta shape (512 -> 384, top 10) with fresh weights, 8,192 normed tokens. Both kinds of logits come
from the same bfloat16 inputs and weights; the exact choice is that of float64.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_dist.model.moe import RouterGate

TOKENS, DIM, EXPERTS, ACTIVE, ROUNDS = 8192, 512, 384, 10, 15


def chosen(logits_NE: Tensor) -> Tensor:
    """The K chosen experts, sorted."""
    return logits_NE.double().softmax(-1).topk(ACTIVE).indices.sort(-1).values


def seconds(step: Callable[[], Tensor]) -> float:
    """Median time of forward and backward."""
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step().float().square().sum().backward()
        found.append(time.perf_counter() - start)
    return statistics.median(found[2:])


def main() -> None:
    """Measure and print."""
    generator = torch.Generator().manual_seed(0)
    gate = RouterGate(DIM, EXPERTS, bias=False)
    torch.nn.init.normal_(gate.weight, std=(5 * DIM) ** -0.5, generator=generator)
    gate.to(torch.bfloat16)
    x_ND = torch.randn(TOKENS, DIM, generator=generator).to(torch.bfloat16).requires_grad_()
    exact = chosen(x_ND.double() @ gate.weight.double().T)
    rounded_NE, float_NE = F.linear(x_ND, gate.weight), gate(x_ND)
    for name, logits_NE in (("bfloat16", rounded_NE), ("float32", float_NE)):
        other = (chosen(logits_NE) != exact).any(-1).double().mean().item()
        best = logits_NE.topk(ACTIVE + 1).values
        ties = (best[:, -1] == best[:, -2]).double().mean().item()
        print(f"{name} logits: {100 * other:.2f} % of tokens choose other experts, {100 * ties:.2f} % tie at place K")
    slow, fast = seconds(lambda: gate(x_ND)), seconds(lambda: F.linear(x_ND, gate.weight))
    print(f"forward and backward: float32 {1000 * slow:.1f} ms, bfloat16 {1000 * fast:.1f} ms, ratio {slow / fast:.2f}")


if __name__ == "__main__":
    main()
