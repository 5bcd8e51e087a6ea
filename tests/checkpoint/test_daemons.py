"""Several files at once, on threads that nobody waits for at the end of a process."""

from __future__ import annotations

import threading
import time

import pytest

from rxt_dist.checkpoint.daemons import map_on_daemons


def test_results_come_in_the_order_of_items() -> None:
    assert map_on_daemons(lambda delay: (time.sleep(delay), delay)[1], [0.02, 0.0, 0.01], 3) == [0.02, 0.0, 0.01]
    assert map_on_daemons(lambda item: item, iter(range(50)), 4) == list(range(50))
    assert map_on_daemons(lambda item: item, [], 4) == []


def test_items_are_worked_on_at_once_and_by_no_more_than_was_asked() -> None:
    meeting = threading.Barrier(3, timeout=10.0)
    before = threading.active_count()
    counts = map_on_daemons(lambda _: (meeting.wait(), threading.active_count())[1], range(6), 3)
    assert max(counts) <= before + 3


def test_no_process_waits_for_them() -> None:
    assert map_on_daemons(lambda _: threading.current_thread().daemon, range(2), 2) == [True, True]


def test_the_first_error_is_raised_and_ends_the_rest() -> None:
    begun = []

    def fail(item: int) -> None:
        begun.append(item)
        raise OSError(f"item {item}")

    with pytest.raises(OSError, match="item 0"):
        map_on_daemons(fail, range(100), 1)
    assert begun == [0]
