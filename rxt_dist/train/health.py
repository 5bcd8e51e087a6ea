"""Whether training goes well, judged by losses alone: what is skipped, what is too high, when to go back.

Pure logic on numbers that are the same on all ranks, so that all come to the same verdict. Its state is part of every
checkpoint, so that a life that goes on from one judges as the life before would have.

Thresholds are meant to be wrong on the safe side: a run that goes back without need loses hours, and one that diverges
does not come back by itself.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rxt_dist.config.run import RunConfig
from rxt_dist.engine.interface import TermTotals

# Losses that the threshold is made from, and the fewest from which one is made.
WINDOW, LEAST = 200, 50
# A normal distribution's standard deviation over its median absolute deviation.
_SIGMA = 1.4826
# A threshold is at least this share above the median: a curve that hardly moves has no deviation to speak of.
_LEAST_RISE = 0.1


@dataclass(frozen=True)
class Streak:
    """Updates in a row that were skipped or whose loss was above the threshold.

    step: the first of them. back_to: the last step whose weights cannot be the reason, as neither they nor the data of
    the step after them had shown anything yet: the update before the streak may be what spoilt it.
    row: where the rows after that step begin.
    """

    step: int
    back_to: int
    row: int
    skipped: int = 0
    spikes: int = 0


class Health:
    """Judges each update of a run.

    Args:
        state: of a checkpoint; None or empty: a run that begins, or one saved by a version without it.
    """

    def __init__(self, config: RunConfig, state: Mapping[str, Any] | None = None) -> None:
        self._most_skipped = config.train.max_skipped_steps
        self._most_spikes = config.health.spikes
        self._deviations = config.health.deviations
        self._knobs = [config.optimizer.lr, config.optimizer.clip]
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._regime: list[int] = []
        # Steps begun last, the newest last: (its number, where its rows begin).
        self._begun: deque[tuple[int, int]] = deque(maxlen=2)
        self.streak: Streak | None = None
        if state:
            self._losses.extend(state["losses"])
            self._regime = list(state["segment"])
            self._begun.extend((step, row) for step, row in state["begun"])
            # Whoever turns the rate or the clip has seen to what went wrong.
            if state["streak"] and state["knobs"] == self._knobs:
                self.streak = Streak(**state["streak"])

    def begin(self, step: int, row: int, regime: Sequence[int]) -> None:
        """A step begins.

        Args:
            step, row: its number, and where its rows begin.
            regime: what the level of losses hangs on (phase of the mixture, size of the batch): where it changes, the
                losses before say nothing about those that follow.
        """
        if list(regime) != self._regime:
            self._losses.clear()
            self._regime = list(regime)
        self._begun.append((step, row))

    @property
    def threshold(self) -> float | None:
        """What a loss may be at most; None while there are too few to say."""
        if len(self._losses) < LEAST:
            return None
        middle = median(self._losses)
        spread = _SIGMA * median(abs(loss - middle) for loss in self._losses)
        return middle + max(self._deviations * spread, _LEAST_RISE * abs(middle))

    def observe(self, applied: bool, loss: float) -> float | None:
        """Take in one update. Returns the threshold, if there is one and the loss was above it.

        A skipped update says nothing about the level of losses, and neither does one above the threshold.
        """
        threshold = self.threshold if applied else None
        high = applied and (not math.isfinite(loss) or (threshold is not None and loss > threshold))
        if applied and not high:
            self.streak = None
            self._losses.append(loss)
            return None
        known = self.streak or self._new_streak()
        self.streak = Streak(known.step, known.back_to, known.row, known.skipped + (not applied), known.spikes + high)
        return threshold

    def _new_streak(self) -> Streak:
        step = self._begun[-1][0]
        before = self._begun[0]
        return Streak(step, before[0] - 1, before[1])

    @property
    def skipping(self) -> bool:
        """Whether the streak has skipped updates in it: then the weights may be spoilt, and are not committed."""
        return self.streak is not None and self.streak.skipped > 0

    @property
    def verdict(self) -> str:
        """Why the run has to go back; empty while it need not."""
        streak = self.streak
        if streak is None:
            return ""
        if streak.skipped >= self._most_skipped:
            return f"{streak.skipped} updates in a row were not finite"
        if streak.spikes >= self._most_spikes:
            return f"{streak.spikes} losses in a row were above the threshold"
        return ""

    def state(self) -> dict[str, Any]:
        """For a checkpoint: JSON values, by names that checkpoints of before have too."""
        return {
            "losses": list(self._losses),
            "segment": self._regime,
            "begun": [list(begun) for begun in self._begun],
            "streak": vars(self.streak) if self.streak else None,
            "knobs": self._knobs,
        }


def objective_of(totals: TermTotals, weights: Iterable[float]) -> float:
    """The loss that was minimised, as a number: the terms' means over the global batch by their weights."""
    terms = zip(totals.sums_J.tolist(), totals.counts_J.tolist(), weights, strict=True)
    return sum(weight * total / max(1.0, count) for total, count, weight in terms)
