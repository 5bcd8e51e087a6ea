"""The harness itself: a failure must be seen, at once and with its reason."""

from __future__ import annotations

import time

import misbehaviour
import pytest
from harness import Ranks

pytestmark = pytest.mark.distributed


def test_results_come_back_in_the_order_of_ranks(ranks: Ranks) -> None:
    answers = ranks.run(misbehaviour.report, 3, word="zażółć")
    assert answers == [{"rank": rank, "world": 3, "word": "zażółć"} for rank in range(3)]


def test_a_failed_rank_ends_the_others_and_shows_its_traceback(ranks: Ranks) -> None:
    before = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit codes \[-9, 1\](.|\n)*rank one has had enough"):
        ranks.run(misbehaviour.fail, 2)
    assert time.monotonic() - before < 30


def test_a_hang_ends_at_the_deadline_and_shows_what_was_printed(ranks: Ranks) -> None:
    with pytest.raises(AssertionError, match=r"exit codes \[-9, -9\] \(deadline 2 s\)(.|\n)*rank 1 waits"):
        ranks.run(misbehaviour.hang, 2, deadline=2)
    assert len(ranks.run(misbehaviour.report, 2, word="alive")) == 2
