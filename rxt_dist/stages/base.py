"""The contract between a stage of training and the rest of the house.

A stage says what it reads, what it makes of a batch, what it computes, and what there is to tell about it. The loop,
the engines, evaluation, checkpoints and plans work with what stands here and name no stage. Its configuration class
(rxt_dist/config/stages.py) says what can be known without torch: parts, groups of learning rates, what is refused.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import ALL, STAGES
from rxt_dist.config.validate import DataFacts
from rxt_dist.data.sampler import GlobalOrder
from rxt_dist.losses import StageOutput
from rxt_dist.model.attention import Documents
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.stages.work import Work as Work

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Positions = npt.NDArray[np.int64]
# `with reading():` the model may be called without gradients; all ranks do so equally often.
Reading = Callable[[], AbstractContextManager[None]]


class SourceName(Protocol):
    """What is weighted and evaluated together."""

    @property
    def name(self) -> str: ...

    @property
    def language(self) -> str: ...


class Batch(Protocol):
    """What a source read, in host memory.

    real_tokens: tokens that are not padding; pairs: sum of the squared lengths of what attends to itself.
    """

    @property
    def real_tokens(self) -> int: ...

    @property
    def pairs(self) -> int: ...

    def micro_batches(self, rows: int) -> Sequence[Batch]:
        """Consecutive parts of `rows` rows, all of the batch's own shape but for their number of rows."""
        ...


class DataSource(Protocol):
    """Where the rows of a run come from.

    The shape of what is read (the number of turns, say) is a function of all rows asked for, never of a rank's part of
    them: ranks that computed differently often would wait for each other for ever.
    """

    @property
    def digests(self) -> Sequence[str]:
        """Identities of the datasets by their content, in the order in which the phases first read them."""
        ...

    @property
    def sources(self) -> Sequence[SourceName]: ...

    @property
    def row_tokens(self) -> int:
        """What one row counts for in the budget, padding included."""
        ...

    @property
    def facts(self) -> DataFacts: ...

    @property
    def order(self) -> GlobalOrder:
        """Which row stands at a position of the training."""
        ...

    def read(self, positions: Positions, part: slice) -> Batch:
        """`part` of the global batch at these positions. Called from another thread, ahead of its use.

        Raises:
            DataError: a row is damaged.
        """
        ...

    def held_out(self, source: int) -> int:
        """Rows of a source that are kept for evaluation."""
        ...

    def read_held_out(self, source: int, rows: Positions, part: slice) -> Batch:
        """`part` of these held-out rows; -1, at the end only, stands for a row that counts for nothing."""
        ...


class MicroBatch(Protocol):
    """Rows that are computed at once, with everything that the stage needs to know about them.

    tokens, pairs: as `real_tokens` and `pairs` of a batch. samples: global positions of its rows.
    """

    @property
    def samples(self) -> tuple[int, ...]: ...

    @property
    def tokens(self) -> int: ...

    @property
    def pairs(self) -> int: ...

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        ...


@dataclass(frozen=True)
class Term:
    """A term of the loss.

    title: what evaluation and the terminal call it; empty: it is logged in training and not evaluated.
    predicts: whether its targets can be hit, so that it has an accuracy beside its loss.
    by_view: whether evaluation reports it for each view, or once for all.
    detail: a part of what another term tells; files have it, the terminal does not.
    """

    name: str
    title: str = ""
    predicts: bool = False
    by_view: bool = False
    detail: bool = False


class Stage(nn.Module, ABC):
    """A stage of training; as a module it maps (micro-batch, load_ME) to a `StageOutput`.

    model: the network; its parameter names are the names in checkpoints.
    terms: terms of the loss, in the order of every vector with suffix J.
    rows_together: evaluation keeps so many rows in one micro-batch, and counts only such groups.
    """

    terms: tuple[Term, ...]
    rows_together = 1

    def __init__(self, model: ReactiveTransformer, run: RunConfig) -> None:
        super().__init__()
        self.model: ReactiveTransformer = model
        self.run = run
        self.freeze(model.named_parameters())

    def freeze(self, named: Iterable[tuple[str, nn.Parameter]]) -> None:
        """Let gradients reach the parameters that the configuration trains, and no other."""
        for name, parameter in named:
            parameter.requires_grad_(self.run.stage.rate_group(name) is not None)

    @classmethod
    @abstractmethod
    def source(cls, run: RunConfig) -> DataSource:
        """Open the data of a run.

        Raises:
            DataError: it is missing, damaged, or not what this stage reads.
        """

    @classmethod
    @abstractmethod
    def flops(cls, run: RunConfig, work: Work) -> int:
        """Floating-point operations of training on `work`, forward and backward (model/flops.py has the convention)."""

    @classmethod
    def flops_by_part(cls, run: RunConfig, work: Work) -> Mapping[str, int]:
        """The same by what they are spent on, for plans."""
        return {"all": cls.flops(run, work)}

    @classmethod
    @abstractmethod
    def expected_work(cls, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """What training on so many tokens comes to, each row being one document: for plans, without any data."""

    @abstractmethod
    def prepare(self, batch: Any, trained_tokens: int | None) -> MicroBatch:
        """Make a micro-batch, labels included, as it is after `trained_tokens` tokens; None: for evaluation."""

    def updates(self, parts: Sequence[Batch], trained_tokens: int, reading: Reading) -> Iterable[Sequence[MicroBatch]]:
        """The updates made from one global batch: of each, this rank's micro-batches.

        A stage that has to see what its model does with a batch first may call it within `with reading():`, and may
        make several updates, at least one. Every rank makes equally many, of equally many micro-batches.
        """
        yield [self.prepare(part, trained_tokens) for part in parts]

    @abstractmethod
    def counts(self, micro: Any) -> Tensor:
        """float64 [terms] on the host: how much each term of this micro-batch counts."""

    @abstractmethod
    def weights(self) -> Tensor:
        """float32 [terms]: weights of the objective."""

    @abstractmethod
    def forward(self, micro: Any, load_ME: Tensor) -> StageOutput:
        """Loss terms of one micro-batch; `load_ME` as in `RoutingInputs`."""

    def weights_of_first(self, *weights: float) -> Tensor:
        """`weights` of the first terms; what comes after them is told, not trained."""
        return torch.tensor([*weights, *[0.0] * (len(self.terms) - len(weights))])

    def levels(self, trained_tokens: int) -> dict[str, float]:
        """Named figures that are scheduled, for the log line."""
        return {}

    def rates(self, trained_tokens: int) -> dict[str, float]:
        """Factor on the learning rate of each of the configuration's rate groups; 0 leaves a group as it is.

        Its gradients count in the global norm all the same: what shall not be felt there is to be detached.
        """
        return {ALL: 1.0}

    def views(self, micro: Any) -> Mapping[str, MicroBatch]:
        """The same rows seen in different ways, for evaluation; the first view reports the terms that all share."""
        return {"": micro}


def stage_class(run: RunConfig) -> type[Stage]:
    """The code of the run's stage."""
    module, name = STAGES[run.stage.kind].code.split(":")
    found: type[Stage] = getattr(import_module(module), name)
    return found


def build_network(run: RunConfig) -> ReactiveTransformer:
    """The network of a run's stage, its weights not yet set."""
    return ReactiveTransformer(run.model, run.stage.parts(), run.train.recompute)


def balance_weight(run: RunConfig, weight: float) -> float:
    """The weight of a balance loss: none where biases balance the experts instead."""
    return weight if run.train.balancing == "loss" else 0.0


B = TypeVar("B", bound="DataclassInstance")


def tensors_to(batch: B, device: torch.device) -> B:
    """A batch with its tensors, those of its documents among them, on a device."""
    moved: dict[str, Any] = {}
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            moved[name] = to_device(value, device)
        elif isinstance(value, Documents):
            moved[name] = Documents(to_device(value.cu_seqlens_N1, device), value.lengths)
    return replace(batch, **moved)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, for which the host does not wait."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
