"""Which stretch of a log is moved where its clocks contradict each other."""

from __future__ import annotations

import pytest
from run_logs import at, moment

from rxt_dist.report.clocks import Clocks
from rxt_dist.report.records import seconds_of

DAY = 86_400


def moved(*times: float | None, now: float = 10 * DAY) -> list[int]:
    """By how much each event that has a time is moved."""
    events = [{"kind": "skip", **({} if time is None else {"time": at(time)})} for time in times]
    right = [seconds_of(event["time"]) for event in Clocks(events, moment(now)).events() if "time" in event]
    known = [time for time in times if time is not None]
    return [round(found - moment(time)) for found, time in zip(right, known, strict=True)]


@pytest.mark.parametrize(
    ("times", "shifts"),
    [
        ((0, 10, 20), [0, 0, 0]),
        # Clocks of two hosts.
        ((0, 3000, 20), [0, 0, 0]),
        # Two days in which nobody lived, and then a clock a day ahead: what was before stays.
        ((0, 2 * DAY, 3 * DAY, 3 * DAY + 9, 2 * DAY + 20), [0, 0, 11 - DAY, 11 - DAY, 0]),
        # A clock that began in 1970 and was set.
        ((0, 10, -9 * DAY, 5 - 9 * DAY, 30), [0, 0, 9 * DAY + 10, 9 * DAY + 10, 0]),
        # It was wrong from the beginning.
        ((DAY, DAY + 5, 20), [15 - DAY, 15 - DAY, 0]),
        # Later than now.
        ((0, 10, 30 * DAY, 30 * DAY + 5), [0, 0, -20 * DAY - 5, -20 * DAY - 5]),
        ((0, None, DAY, 10), [0, 10 - DAY, 0]),
    ],
)
def test_the_stretch_of_the_wrong_clock_is_moved(times: tuple[float | None, ...], shifts: list[int]) -> None:
    assert moved(*times) == shifts


def test_lines_follow_their_stretch_in_the_order_of_their_file() -> None:
    """One of the wrong clock and a later one of the right clock may state the same time."""
    events = [{"kind": "skip", "time": at(time)} for time in (0, 10, DAY, DAY + 9, 20, DAY, 2 * DAY)]
    clocks = Clocks(events, moment(10 * DAY))
    found = clocks.lines([moment(time) for time in (5, DAY + 5, 40, DAY + 5)])
    assert [round(time - moment(0)) for time in found] == [5, 16, 40, DAY + 5]


def test_of_a_log_whose_times_are_noise_nothing_is_believed_or_moved() -> None:
    assert set(moved(*[DAY * (number % 2) for number in range(500)])) == {0}
    assert Clocks([], moment(0)).right
