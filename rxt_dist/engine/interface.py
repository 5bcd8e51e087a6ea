"""What the training loop asks of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rxt_dist.engine.collectives import Collectives
from rxt_dist.stages.base import MicroBatch

WEIGHT, FIRST_MOMENT, SECOND_MOMENT = KINDS = "weight", "exp_avg", "exp_avg_sq"


@dataclass(frozen=True)
class TermTotals:
    """Loss sums (float64), counts (float64) and hits (int64) of all terms, over all ranks and micro-batches.

    tokens, pairs: the same sums of what micro-batches say of themselves. All of it is in host memory.
    """

    sums_J: Tensor
    counts_J: Tensor
    hits_J: Tensor
    tokens: int
    pairs: int


@dataclass(frozen=True)
class StepResult:
    """One optimizer step.

    applied: False when the update was skipped on all ranks; `reason` then says why.
    grad_norm: global norm before clipping, experts counted once.
    expert_counts_ME: int64 choices per MoE layer and expert in the whole global batch, in host memory.
    """

    applied: bool
    reason: str
    totals: TermTotals
    grad_norm: float
    expert_counts_ME: Tensor


@dataclass(frozen=True)
class NonFinite:
    """Where numbers first were not finite.

    layer: name of the module of the network; backward: whether it was met in the gradient of what the module gave;
    micro: number of the rank's micro-batch; place: how many layers had been looked at in it before. Of several ranks
    the lowest place is where it began, since tokens carry it to other ranks.
    """

    layer: str
    backward: bool
    micro: int
    place: int


@dataclass(frozen=True)
class Fragment:
    """A piece of one parameter that lives on this rank, with its optimizer moments.

    name: the parameter's name in the model; start: offset of the piece in the flattened parameter.
    tensors: float32 views [n] into the engine's own storage: weight, exp_avg, exp_avg_sq. Saving reads them; loading,
    and setting the first weights, writes them.
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]


def at_once() -> None:
    """Nothing holds an update back."""


class Engine(Protocol):
    """Trains one stage. Every method is collective: all ranks call it together."""

    ranks: Collectives
    device: torch.device

    def train_step(
        self,
        micros: Sequence[MicroBatch],
        rates: Mapping[str, float],
        before_update: Callable[[], None] = at_once,
    ) -> StepResult:
        """Forward, backward and update over this rank's micro-batches of one global batch.

        Args:
            rates: the learning rate of each of the stage's rate groups.
            before_update: called after the backward pass, before weights or moments change: whoever still reads them
                lets the update wait.
        """
        ...

    def inspect(self, micros: Sequence[MicroBatch]) -> NonFinite | None:
        """Where in this rank's micro-batches of a skipped step numbers first were not finite, by computing them anew.

        Nothing of the training state changes. None: it was not met again.
        """
        ...

    def differing_ranks(self) -> list[int]:
        """Ranks whose copy of the weights differs from that of the others in a bit, as far as ranks hold copies."""
        ...

    def reading(self) -> AbstractContextManager[None]:
        """While the block lasts the stage's model, or a part of it, may be called without gradients.

        All ranks call the same parts equally often, since they exchange tokens and weights in every call. Neither
        `train_step` nor `evaluate` may stand within it.
        """
        ...

    def evaluate(self, micros: Sequence[MicroBatch]) -> TermTotals:
        """Loss terms without gradients; all ranks pass equally many micro-batches."""
        ...

    def fragments(self, *, owned: bool) -> Iterator[Fragment]:
        """This rank's pieces of the training state; `owned` leaves out what another rank saves too."""
        ...

    def frozen_fragments(self) -> Iterator[Fragment]:
        """This rank's pieces of the weights that are not trained, in the type in which they are computed with.

        They are written like `fragments`; what is saved of them is in `checkpoint/frozen.py`.
        """
        ...

    def routing_state(self) -> dict[str, Tensor]:
        """Expert counts of the last global batch and routing biases, equal on all ranks."""
        ...

    def finish_load(self, optimizer_steps: int, routing: Mapping[str, Tensor]) -> None:
        """After all fragments were written: set step counters, refresh low-precision weights, routing state."""
        ...

    def describe(self) -> list[str]:
        """One line per decision about speed and memory, for the start banner."""
        ...

    def close(self) -> None:
        """Free what the engine holds beside the process group."""
        ...
