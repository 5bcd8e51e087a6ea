"""From step results to the figures of a log line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.interface import StepResult
from rxt_dist.errors import CheckpointError
from rxt_dist.stages.base import Stage, Work


class Interval:
    """What happened since the last log line. Losses are means over the interval's targets, not over its updates.

    Args:
        state: of a checkpoint that was made since the last line, which the line that follows continues; None or empty:
            there is none.
    """

    def __init__(
        self, config: RunConfig, stage: Stage, world_size: int, state: Mapping[str, Any] | None = None
    ) -> None:
        self.config = config
        self.stage = stage
        self.world_size = world_size
        self._restart()
        if state:
            self._sums_J, self._counts_J = (self._of_terms(_floats(state[name])) for name in ("sums", "counts"))
            self._hits_J = self._of_terms(torch.tensor(state["hits"], dtype=torch.int64))
            self._tokens, self._pairs = state["tokens"], state["pairs"]
            self.steps, self._skipped = state["steps"], state["skipped"]
            self._started = time.monotonic() - state["seconds"]
            self.waited = state["waited"]

    def _of_terms(self, saved_J: Tensor) -> Tensor:
        """What was saved of each term; those that an earlier version did not have are the last ones.

        Raises:
            CheckpointError: there are more than this version has.
        """
        missing = len(self.stage.terms) - len(saved_J)
        if missing < 0:
            raise CheckpointError(
                f"The checkpoint has sums of {len(saved_J)} terms of the loss, but this version of the program has "
                f"{len(self.stage.terms)}. Resume with the version that wrote it."
            )
        return F.pad(saved_J, (0, missing))

    def _restart(self) -> None:
        terms = len(self.stage.terms)
        self._sums_J = torch.zeros(terms, dtype=torch.float64)
        self._counts_J = torch.zeros(terms, dtype=torch.float64)
        self._hits_J = torch.zeros(terms, dtype=torch.int64)
        self._tokens = self._pairs = self._skipped = 0
        self._last: StepResult | None = None
        self.steps = 0
        self.waited = 0.0
        self._started = time.monotonic()
        self._paused_at: float | None = None

    def add_step(self, waited: float) -> None:
        """A step begins, for whose data the rank has waited so many seconds."""
        self.steps += 1
        self.waited += waited

    def add(self, result: StepResult) -> None:
        """Take in one update of the step."""
        totals = result.totals
        self._sums_J += totals.sums_J
        self._counts_J += totals.counts_J
        self._hits_J += totals.hits_J
        self._tokens += totals.tokens
        self._pairs += totals.pairs
        self._skipped += not result.applied
        self._last = result

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that is not spent on training (evaluating, saving) does not count."""
        self._paused_at = time.monotonic()
        try:
            yield
        finally:
            self._started += time.monotonic() - self._paused_at
            self._paused_at = None

    @property
    def seconds(self) -> float:
        """Time spent on training since the last line."""
        return (self._paused_at or time.monotonic()) - self._started

    @property
    def has_update(self) -> bool:
        """Whether there is something to say: not where all steps were passed over."""
        return self._last is not None

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON values. Sums as hexadecimal texts, which can be infinite and lose no bit."""
        return {
            "sums": [value.hex() for value in self._sums_J.tolist()],
            "counts": [value.hex() for value in self._counts_J.tolist()],
            "hits": self._hits_J.tolist(),
            "tokens": self._tokens,
            "pairs": self._pairs,
            "steps": self.steps,
            "skipped": self._skipped,
            "seconds": self.seconds,
            "waited": self.waited,
        }

    def figures(self) -> dict[str, float | list[float]]:
        """The figures of the interval, which ends here; it has at least one update."""
        seconds, last = self.seconds, self._last
        assert last is not None
        counts = {term.name: count for term, count in zip(self.stage.terms, self._counts_J.tolist(), strict=True)}
        line: dict[str, float | list[float]] = {}
        # Of what the interval had none of there is nothing to say.
        for term, total in zip(self.stage.terms, self._sums_J.tolist(), strict=True):
            if counts[term.name]:
                line[f"{term.name}_loss"] = total / counts[term.name]
        for term, hits in zip(self.stage.terms, self._hits_J.tolist(), strict=True):
            if term.predicts and counts[term.name]:
                line[f"{term.name}_accuracy"] = hits / counts[term.name]
        line["grad_norm"] = last.grad_norm
        line["skipped"] = self._skipped
        flops = self.stage.flops(self.config, Work(self._tokens, self._pairs, counts))
        peak = self.world_size * self.config.cluster.peak_tflops * 1e12
        line["tokens_per_s"] = self._tokens / seconds
        line["mfu"] = flops / (seconds * peak)
        line["step_s"] = seconds / self.steps
        line["steps"] = self.steps
        line |= expert_figures(last)
        self._restart()
        return line


def _floats(texts: list[str]) -> Tensor:
    return torch.tensor([float.fromhex(text) for text in texts], dtype=torch.float64)


def expert_figures(result: StepResult) -> dict[str, float | list[float]]:
    """How evenly the last update's tokens went to experts: per layer the load max / mean, and the share without any.

    Nothing where the stage has no experts.
    """
    if not result.expert_counts_ME.numel():
        return {}
    counts_ME = result.expert_counts_ME.double()
    mean_M = counts_ME.mean(-1).clamp_min(1e-9)
    return {
        "expert_load_max": (counts_ME.amax(-1) / mean_M).tolist(),
        "experts_idle": (counts_ME == 0).double().mean().item(),
    }
