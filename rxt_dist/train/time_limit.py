"""A wall-clock limit: when a run has to begin to stop so that its last checkpoint is committed in time."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Self

from rxt_dist.config.duration import seconds_of
from rxt_dist.lives import Life

# Of the last saves and steps the longest counts: evaluations and slow disks come back.
_SAVES, _STEPS = 5, 50
# Before the first save: a share of the limit, at most a minute.
_UNKNOWN_SHARE, _UNKNOWN_SECONDS = 0.1, 60.0
# A save may have to wait for one that is being written, and ranks take a moment to end.
_SAFETY, _ENDING_SECONDS = 2.0, 2.0


class TimeLimit:
    """The time that a launch may take, and what a stop is expected to need of it.

    Args:
        text: the limit (`3h50m`).
        end: when it is over, in seconds since the epoch.
    """

    def __init__(self, text: str, end: float) -> None:
        self.text = text
        self._end = time.monotonic() + end - time.time()
        self._saves: deque[float] = deque(maxlen=_SAVES)
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._asked_at: float | None = None
        self._near = False

    @classmethod
    def of(cls, text: str, life: Life) -> Self:
        """The limit of a run in one life: a launcher's counts for all its lives together."""
        return cls(text, life.deadline if life.deadline is not None else life.launched + seconds_of(text))

    def hear(self, event: dict[str, Any]) -> None:
        """Learn from an event of the run, of an earlier life or this one, how long saves take."""
        if event.get("kind") == "save" and isinstance(event.get("seconds"), int | float):
            self._saves.append(float(event["seconds"]))

    @property
    def lead_seconds(self) -> float:
        """How long before the end a stop has to begin: one more step, a save, the end of the processes."""
        unknown = min(_UNKNOWN_SECONDS, _UNKNOWN_SHARE * seconds_of(self.text))
        save = _SAFETY * max(self._saves) if self._saves else unknown
        return save + max(self._steps, default=0.0) + min(_ENDING_SECONDS, unknown)

    def is_near(self) -> bool:
        """Whether to stop at this step boundary. Once it is, it stays so."""
        now = time.monotonic()
        if self._asked_at is not None:
            self._steps.append(now - self._asked_at)
        self._asked_at = now
        self._near = self._near or now + self.lead_seconds >= self._end
        return self._near
