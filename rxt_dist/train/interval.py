"""From step results to the figures of a log line."""

from __future__ import annotations

import time

import torch

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.interface import StepResult
from rxt_dist.stages.base import Stage, Work


class Interval:
    """What happened since the last log line. Losses are means over the interval's targets, not over its updates."""

    def __init__(self, config: RunConfig, stage: Stage, world_size: int) -> None:
        self.config = config
        self.stage = stage
        self.world_size = world_size
        self._restart()

    def _restart(self) -> None:
        self._results: list[StepResult] = []
        self._steps = 0
        self._started = time.monotonic()

    def add_step(self) -> None:
        """A step begins."""
        self._steps += 1

    def add(self, result: StepResult) -> None:
        """Take in one update of the step."""
        self._results.append(result)

    def exclude(self, seconds: float) -> None:
        """Leave out time that was not spent on training (evaluating, saving)."""
        self._started += seconds

    def figures(self) -> dict[str, float | list[float]]:
        """The figures of the interval, which ends here."""
        seconds = time.monotonic() - self._started
        results = self._results
        sums_J = torch.stack([result.totals.sums_J for result in results]).sum(0).tolist()
        counts_J = torch.stack([result.totals.counts_J for result in results]).sum(0).tolist()
        hits_J = torch.stack([result.totals.hits_J for result in results]).sum(0).tolist()
        tokens = sum(result.totals.tokens for result in results)
        pairs = sum(result.totals.pairs for result in results)
        terms = self.stage.terms
        counts = {term.name: count for term, count in zip(terms, counts_J, strict=True)}
        line: dict[str, float | list[float]] = {}
        for term, total in zip(terms, sums_J, strict=True):
            line[f"{term.name}_loss"] = total / max(1.0, counts[term.name])
        for term, hits in zip(terms, hits_J, strict=True):
            if term.predicts:
                line[f"{term.name}_accuracy"] = hits / max(1.0, counts[term.name])
        line["grad_norm"] = results[-1].grad_norm
        line["skipped"] = sum(not result.applied for result in results)
        flops = self.stage.flops(self.config, Work(tokens, pairs, counts))
        peak = self.world_size * self.config.cluster.peak_tflops * 1e12
        line["tokens_per_s"] = tokens / seconds
        line["mfu"] = flops / (seconds * peak)
        line["step_s"] = seconds / self._steps
        line |= expert_figures(results[-1])
        self._restart()
        return line


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
