"""Chains of operations that are bound by memory, each one function, so that a compiler can make one kernel of it.

A chain reads and writes whole activations once per operation; compiled (`compile_chains`) it does so once in all.
Compiled are these functions and not whole layers: their shapes do not depend on how many documents a batch packs or how
long they are, and modules stay as they are, so that engines may gather and free weights around each of them. A chain is
defined where it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# A chain is compiled once per combination of widths, type and gradient mode; torch gives up after eight.
_COMPILED_FORMS = 64

CHAINS: list[Chain[Any, Any]] = []


class Chain(Generic[P, R]):
    """A pure function of tensors.

    formula: in operations that a compiler can fuse. eager: another form of the same, where one runs better uncompiled.
    """

    def __init__(self, formula: Callable[P, R], eager: Callable[P, R] | None = None) -> None:
        self.formula = formula
        self.eager = eager or formula
        self._chosen = self.eager
        self._compiled: dict[str, Callable[P, R]] = {}
        CHAINS.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function returns."""
        if self.compiled:
            # In the thread that calls, since from torch 2.12 on the limit is one's own, and backward passes on a device
            # run in a thread of theirs.
            torch._dynamo.config.recompile_limit = _COMPILED_FORMS
        return self._chosen(*args, **kwargs)

    @property
    def compiled(self) -> bool:
        """Whether the formula is what runs."""
        return self._chosen is not self.eager

    def compile(self, backend: str | None) -> None:
        """See `compile_chains`."""
        if backend is None:
            self._chosen = self.eager
        else:
            # Kept, since a new one would compile everything again.
            if backend not in self._compiled:
                self._compiled[backend] = torch.compile(self.formula, backend=backend, fullgraph=True)
            self._chosen = self._compiled[backend]


def compile_chains(backend: str | None) -> None:
    """Let every chain be compiled at its first calls in this process, or run as it is.

    Args:
        backend: of torch.compile, such as "inductor"; None: nothing is compiled.
    """
    for chain in CHAINS:
        chain.compile(backend)


def swiglu_formula(gate_up: Tensor) -> Tensor:
    """SiLU(g) * u of [..., 2F], gate half first -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    return swiglu_formula(gate_up) * weight.to(gate_up.dtype).unsqueeze(-1)


swiglu = Chain(swiglu_formula)
# swiglu, and each row times a weight of its own: ([..., 2F], [...]) -> [..., F].
weighted_swiglu = Chain(_weighted_swiglu)
