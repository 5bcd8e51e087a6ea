"""Chains of operations: what a compiler is given is what runs without one, and it is given it once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch._inductor.config
from tiny import ROWS, TOKENS, make_stage, model_config, packed_batch, relative, run_config
from torch import Tensor
from torch._dynamo.utils import counters

from rxt_dist.config.stages import LinearSchedule
from rxt_dist.losses import objective
from rxt_dist.model import attention, cross_entropy, experts, moe, norm_rope
from rxt_dist.model.fused import CHAINS, Chain, compile_chains, swiglu, weighted_swiglu
from rxt_dist.stages import joint

TOLERANCE = 1e-5
# Uneven documents, a single one, and none but padding; never the same number twice.
BATCHES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((20, 9), (32,), (5,), (1, 30, 1), (11, 11), (3, 4, 5, 6), (31,), (16, 16)),
    ((32,), (32,), (32,), (32,), (32,), (32,), (32,), (31, 1)),
    ((1, 1, 1), (2, 30), (8, 8, 8, 8), (), (5, 5), (32,), (17,), (1,)),
    ((4, 4, 4, 4, 4, 4, 4, 4), (32,), (7,), (), (), (9, 9, 9), (30, 2), (12,)),
)


@pytest.fixture(autouse=True)
def _uncompiled() -> Iterator[None]:
    yield
    compile_chains(None)
    torch._dynamo.reset()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def several(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def turn() -> Tensor:
    return norm_rope.rotary(model_config(), torch.arange(5)[None].expand(2, 5)).turn


def probabilities() -> Tensor:
    return numbers(9, 8).softmax(-1)


POSITIONS = torch.randperm(12, generator=torch.Generator().manual_seed(5)).view(6, 2)
VALID = torch.arange(9) % 4 != 1
TARGETS = torch.tensor([3, -100, 0, 10, -100])
CALLS: dict[str, tuple[Chain[Any, Any], Any]] = {
    "swiglu": (swiglu, lambda: (numbers(4, 12),)),
    "weighted swiglu": (weighted_swiglu, lambda: (numbers(4, 12), numbers(4, seed=1))),
    "gate": (attention._gated, lambda: (numbers(2, 5, 6), numbers(2, 5, 6, seed=1))),
    "norm": (norm_rope._norm, lambda: (numbers(2, 5, 16), numbers(16, seed=1), 1e-6)),
    "rotation": (norm_rope._rotate, lambda: (numbers(2, 5, 4, 8), turn())),
    "choice": (moe._choice, lambda: (numbers(9, 8), 2, None)),
    "biased choice": (moe._choice, lambda: (numbers(9, 8), 2, torch.linspace(-0.3, 0.3, 8))),
    "terms": (
        moe._terms,
        lambda: (numbers(9, 8), probabilities(), torch.arange(18).view(9, 2) % 8, VALID, torch.full((8,), 0.125)),
    ),
    "rows": (experts._sum_choices, lambda: (numbers(12, 7).detach(), POSITIONS, None)),
    "weighted rows": (experts._sum_choices, lambda: (numbers(12, 7).detach(), POSITIONS, numbers(6, 2).detach())),
    "classes": (cross_entropy._chunk_sums, lambda: (numbers(5, 11).detach(), torch.empty(5, 11), TARGETS, True)),
    "classes alone": (cross_entropy._chunk_sums, lambda: (numbers(5, 11).detach(), torch.empty(5, 11), TARGETS, False)),
    "memory": (
        joint._cheated,
        lambda: (numbers(2, 5, 6), numbers(2, 5, 6, seed=1), torch.rand(2, 5, 1), *torch.tensor([0.5, 0.3])),
    ),
}


def test_every_chain_is_looked_at_here() -> None:
    assert {id(chain) for chain, _ in CALLS.values()} == {id(chain) for chain in CHAINS}


@pytest.mark.parametrize("name", CALLS)
def test_the_formula_is_what_runs_uncompiled(name: str) -> None:
    chain, make = CALLS[name]
    results = []
    for function in (chain.formula, chain.eager):
        torch.manual_seed(0)
        arguments = make()
        outputs = several(function(*arguments))
        loss = sum((output * (output.detach() + 1)).sum() for output in outputs if output.requires_grad)
        leaves = [argument for argument in arguments if isinstance(argument, Tensor) and argument.requires_grad]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, Tensor) else ()
        results.append([*outputs, *(gradient for gradient in gradients if gradient is not None)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def step(stage: Any, number: int) -> tuple[Tensor, list[Tensor]]:
    """Loss sums and gradients of one batch, with noise and masking of its own."""
    lengths, trained = BATCHES[number], 1000 * number
    stage.zero_grad()
    batch = packed_batch(lengths=lengths)
    micro = stage.prepare(batch, trained)
    layers = stage.model.decoder.config.moe_layers
    output = stage(micro, torch.full((layers, 8), 0.125))
    objective(output.sums_J, stage.counts(micro).float(), stage.weights()).backward()
    return output.sums_J.detach(), [p.grad.clone() for p in stage.model.parameters() if p.grad is not None]


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_step_is_the_uncompiled_one_and_is_compiled_once(recompute: bool) -> None:
    """Traced, split into forward and backward and run by operations: all of torch.compile but the making of kernels."""
    rising = LinearSchedule(start=0.2, end=0.9, tokens=4000)
    config = run_config(recompute=recompute, memory_noise=rising, memory_masking=rising)
    stage = make_stage(config)
    compile_chains("aot_eager")
    for number in range(2):
        step(stage, number)
    forms = counters["stats"]["unique_graphs"]
    assert forms >= len(CHAINS)
    compiled = [step(stage, number) for number in range(len(BATCHES))]
    assert counters["stats"]["unique_graphs"] == forms, "something is compiled again when documents change"
    compile_chains(None)
    for number, (sums, gradients) in enumerate(compiled):
        expected_sums, expected_gradients = step(stage, number)
        assert relative(sums, expected_sums) < TOLERANCE
        assert max(map(relative, gradients, expected_gradients)) < TOLERANCE


@pytest.mark.slow
def test_another_thread_may_compile_as_many_forms() -> None:
    """Backward passes on a device run in a thread of their own, where torch counts for itself from 2.12 on."""
    compile_chains("eager")
    shapes = [(2,) * axes for axes in range(1, 6)]

    def call() -> list[Tensor]:
        return [swiglu(torch.ones(shape, dtype=dtype)) for shape in shapes for dtype in (torch.float32, torch.float64)]

    with ThreadPoolExecutor(1) as thread:
        assert len(thread.submit(call).result()) == 2 * len(shapes)


@pytest.mark.slow
def test_kernels_of_the_compiler_compute_the_same() -> None:
    """A chain by inductor itself; GPUs compile all (tests/cuda)."""
    compile_chains("inductor")
    # Which vector instructions there are, it asks the C++ compiler six times, most of the time of this test.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False}):
        chain, make = CALLS["choice"]
        arguments = make()
        for mine, theirs in zip(several(chain(*arguments)), several(chain.eager(*arguments)), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_rows_and_tokens_are_those_of_the_batches() -> None:
    assert all(len(lengths) == ROWS and max(map(sum, lengths)) <= TOKENS for lengths in BATCHES)
