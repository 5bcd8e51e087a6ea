"""What a decoder predicts in rows, and the figures of an answer by its parts: thinking, answer, call of a tool, end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rxt_dist.data.interactions import ANSWER_PARTS
from rxt_dist.data.masking import IGNORED_LABEL
from rxt_dist.losses import StageOutput, sums_by
from rxt_dist.model.cross_entropy import ClassifierSums
from rxt_dist.stages.base import Term

# The last terms of a stage that tells the parts of answers apart; they are told, not trained.
PART_TERMS = tuple(Term(name, name, predicts=True, by_view=True, detail=True) for name in ANSWER_PARTS)


class Labels(NamedTuple):
    """What is predicted at each position of B rows, in host memory.

    labels_BT: int64, -100 for nothing. parts_BT: int64, which of PART_TERMS each label is of, their number where there
    is no label; None: parts are not told apart.
    """

    labels_BT: Tensor
    parts_BT: Tensor | None = None

    @property
    def targets(self) -> int:
        """How many labels there are."""
        return int((self.labels_BT != IGNORED_LABEL).sum())

    @property
    def part_targets(self) -> tuple[int, ...]:
        """How many of each of PART_TERMS; empty where parts are not told apart."""
        return () if self.parts_BT is None else counts_by_part(self.parts_BT)


def counts_by_part(parts: Tensor) -> tuple[int, ...]:
    """How many labels are of each of PART_TERMS."""
    counted: list[int] = torch.bincount(parts.flatten(), minlength=len(PART_TERMS)).tolist()
    return tuple(counted[: len(PART_TERMS)])


def with_parts(output: StageOutput, predicted: ClassifierSums, parts_BT: Tensor | None) -> StageOutput:
    """The output with PART_TERMS behind its terms, where parts are told apart."""
    if parts_BT is None:
        return output
    sums_J, hits_J = sums_by(parts_BT.flatten(), len(PART_TERMS), predicted.losses_N, predicted.hits_N)
    return output._replace(sums_J=torch.cat([output.sums_J, sums_J]), hits_J=torch.cat([output.hits_J, hits_J]))
