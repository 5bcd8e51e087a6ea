"""From step results to the figures of a log line.

Losses and counts stay tensors until the log interval ends; then one host copy and one small reduction make the line.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from rxt_dist.config.run import RunConfig
from rxt_dist.data.loader import Batch
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import StepResult
from rxt_dist.train.flops import training_flops


class Interval:
    """What happened since the last log line. Losses are means over the interval's targets, not over its steps."""

    def __init__(self, config: RunConfig, terms: Sequence[str], ranks: Collectives) -> None:
        self.config = config
        self.terms = tuple(terms)
        self.ranks = ranks
        self._restart()

    def _restart(self) -> None:
        self._results: list[StepResult] = []
        self._squares = 0
        self._started = time.monotonic()

    def add(self, result: StepResult, batch: Batch) -> None:
        """Take in one step and this rank's part of its batch."""
        self._results.append(result)
        lengths = batch.cu_seqlens.diff()
        is_document = batch.segments_BT.flatten()[batch.cu_seqlens[:-1].long()] >= 0
        self._squares += int((lengths[is_document].long() ** 2).sum())

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on training (evaluating, saving)."""
        self._started += seconds

    def figures(self) -> dict[str, float | list[float]]:
        """The figures of the interval, which ends here; all ranks together."""
        seconds = time.monotonic() - self._started
        results = self._results
        sums_T = torch.stack([result.totals.sums_T for result in results]).sum(0).tolist()
        counts_T = torch.stack([result.totals.counts_T for result in results]).sum(0).tolist()
        hits_T = torch.stack([result.totals.hits_T for result in results]).sum(0).tolist()
        squares = int(self.ranks.sum(torch.tensor(self._squares)).item())
        line: dict[str, float | list[float]] = {}
        for term, total, count in zip(self.terms, sums_T, counts_T, strict=True):
            line[f"{term}_loss"] = total / max(1.0, count)
        for term in ("ar", "mlm"):
            at = self.terms.index(term)
            line[f"{term}_accuracy"] = hits_T[at] / max(1.0, counts_T[at])
        line["grad_norm"] = results[-1].grad_norm
        line["skipped"] = sum(not result.applied for result in results)
        tokens = int(counts_T[self.terms.index("z")])
        flops = training_flops(self.config.model, tokens, squares, int(counts_T[self.terms.index("mlm")]))
        peak = self.ranks.world_size * self.config.cluster.peak_tflops * 1e12
        line["tokens_per_s"] = tokens / seconds
        line["mfu"] = flops / (seconds * peak)
        line["step_s"] = seconds / len(results)
        line |= expert_figures(results[-1])
        self._restart()
        return line


def expert_figures(result: StepResult) -> dict[str, float | list[float]]:
    """How evenly the last step's tokens went to experts: per layer the load max / mean, and the share without any."""
    counts_ME = result.expert_counts_ME.double()
    mean_M = counts_ME.mean(-1).clamp_min(1e-9)
    return {
        "expert_load_max": (counts_ME.amax(-1) / mean_M).tolist(),
        "experts_idle": (counts_ME == 0).double().mean().item(),
    }
