"""Times of a run whose clock was wrong for a while, as if it had not been: a node whose clock is a day ahead, or one
that began in 1970 and was set an hour later.

Events stand in the order in which they happened. Where their times go back by more than an hour, a stretch of them was
written by a wrong clock: it is moved to where it fits, and keeps what it lasted. Which stretch, the other jump says by
which the clock became wrong or right again. Smaller differences are those of honest clocks, and stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rxt_dist.report.records import seconds_of

_TOLERANCE_S = 3600.0
# Of a log with more of them nothing is known by its times.
_MOST_JUMPS = 100


@dataclass(frozen=True)
class _Stretch:
    """Events in a row by one clock: their times as written, and what is to be added to them; in seconds."""

    first: float
    last: float
    shift: float

    def holds(self, time: float) -> bool:
        return self.first - _TOLERANCE_S <= time <= self.last + _TOLERANCE_S


class Clocks:
    """The clocks by which a run was written.

    Args:
        events: in their order.
        now: seconds since 1970; what is later was written by a wrong clock, too.
    """

    def __init__(self, events: Sequence[Mapping[str, Any]], now: float) -> None:
        self._events = events
        # An event tells of the launch before it by the same clock.
        times = [[seconds_of(event.get(name)) for name in ("launched", "time")] for event in events]
        known = [time for of_event in times for time in of_event if math.isfinite(time)]
        shifts = _shifts([*known, now])
        self.right = not any(shifts)
        self._stretches: list[_Stretch] = []
        # The stretch of each event; of one without a time, that of the event before it.
        self._of_event: list[int] = []
        numbered = iter(zip(known, shifts, strict=False))
        for of_event in times:
            for time in of_event:
                if math.isfinite(time):
                    self._add(*next(numbered))
            self._of_event.append(max(0, len(self._stretches) - 1))

    def _add(self, time: float, shift: float) -> None:
        last = self._stretches[-1] if self._stretches else None
        if last is None or last.shift != shift:
            self._stretches.append(_Stretch(time, time, shift))
        else:
            self._stretches[-1] = _Stretch(min(last.first, time), max(last.last, time), shift)

    def events(self) -> list[Mapping[str, Any]]:
        """The events with their right times."""
        return [self._event(event, at) for event, at in zip(self._events, self._of_event, strict=True)]

    def _event(self, event: Mapping[str, Any], at: int) -> Mapping[str, Any]:
        if not self._stretches:
            return event
        own = self._stretches[at].shift
        # What an event says of an earlier life was that one's clock.
        until = seconds_of(event.get("lost_until"))
        before = next((one.shift for one in reversed(self._stretches[: at + 1]) if one.holds(until)), own)
        moved = {"time": own, "launched": own, "lost_until": before}
        return {**event, **{name: _moved(event[name], shift) for name, shift in moved.items() if name in event}}

    def lines(self, times: Iterable[float]) -> list[float]:
        """The right times of lines, in the order in which they stand in their own file."""
        found, at = [], 0
        for time in times:
            later = range(at, len(self._stretches))
            at = next((index for index in later if self._stretches[index].holds(time)), at)
            found.append(time + self._stretches[at].shift if self._stretches else time)
        return found


def _shifts(times: Sequence[float]) -> list[float]:
    """What is to be added to each time, so that none is more than the tolerance before the one that it follows; the
    last is now."""
    moved = list(times)
    for _ in range(_MOST_JUMPS):
        jump = next((at for at in range(1, len(moved)) if moved[at] < moved[at - 1] - _TOLERANCE_S), None)
        if jump is None:
            break
        size = moved[jump - 1] - moved[jump]
        ahead = [at for at in range(1, jump) if moved[at] - moved[at - 1] >= size - _TOLERANCE_S]
        set_right = [at for at in range(jump + 1, len(moved) - 1) if moved[at] - moved[at - 1] >= size - _TOLERANCE_S]
        if ahead:
            wrong, by = range(ahead[-1], jump), -size
        elif set_right:
            wrong, by = range(jump, set_right[0]), size
        else:
            wrong, by = range(jump), -size
        for at in wrong:
            moved[at] += by
    else:
        return [0.0] * len(times)
    return [right - time for right, time in zip(moved, times, strict=True)]


def _moved(time: Any, shift: float) -> Any:
    moment = seconds_of(time)
    if not (shift and math.isfinite(moment)):
        return time
    try:
        return datetime.fromtimestamp(moment + shift, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return time
