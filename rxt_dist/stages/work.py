"""How much a stage computes, from its configuration alone: what plans and utilisation ask, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import STAGES


@dataclass(frozen=True)
class Work:
    """What was computed: real tokens, pairs (see `Batch`), and how much each term counted, by name."""

    tokens: int
    pairs: int
    counts: Mapping[str, float]


class Arithmetic(Protocol):
    """What a stage says of its operations; every `Stage` is one."""

    def flops(self, run: RunConfig, work: Work) -> int:
        """Floating-point operations of training on `work`, forward and backward (model/flops.py has the convention)."""
        ...

    def flops_by_part(self, run: RunConfig, work: Work) -> Mapping[str, int]:
        """The same by what they are spent on."""
        ...

    def expected_work(self, run: RunConfig, tokens: int, seq_len: int) -> Work:
        """What training on so many tokens comes to, each row being one document: for plans, without any data."""
        ...


def arithmetic(run: RunConfig) -> Arithmetic:
    """The arithmetic of the run's stage; its code where it has none that stands apart."""
    entry = STAGES[run.stage.kind]
    module, name = (entry.work or entry.code).split(":")
    found: Arithmetic = getattr(import_module(module), name)
    return found
