from __future__ import annotations

from collections import Counter

import pytest

from data_prep.cleaning.interval import (
    Drawn,
    Tally,
    clopper_pearson,
    documents_of,
    incomplete_beta,
    interval,
)


def tally(*parts: tuple[int, int]) -> Tally:
    """Of parts (documents, how many of them were dropped)."""
    made = Tally()
    for documents, dropped in parts:
        made.add_part(documents, Counter({"bad": dropped}) if dropped else Counter())
    return made


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.30850), (5, 10, 0.18709, 0.81291), (10, 10, 0.69150, 1.0), (1, 64, 0.00040, 0.08401)],
)
def test_the_binomial_interval_is_that_of_the_tables(successes: int, trials: int, low: float, high: float) -> None:
    assert clopper_pearson(successes, trials) == pytest.approx((low, high), abs=1e-5)


def test_the_beta_distribution_is_that_of_the_tables() -> None:
    assert incomplete_beta(2, 3, 0.4) == pytest.approx(0.5248)
    assert incomplete_beta(0.5, 2, 0.9) == pytest.approx(0.996118, abs=1e-6)
    assert (incomplete_beta(2, 3, 0), incomplete_beta(2, 3, 1)) == (0, 1)


def test_where_every_document_was_tried_the_share_is_exact() -> None:
    found = interval([(Drawn(2, 2, 1.0), tally((10, 3), (90, 7)))], "bad")
    assert (found.low, found.share, found.high) == (0.1, 0.1, 0.1)
    assert interval([(Drawn(1, 1, 1.0), tally((10, 0)))], "bad").high == 0


def test_documents_tried_one_by_one_give_the_binomial_interval() -> None:
    found = interval([(Drawn(1, 1, 0.01), tally((1000, 100)))], "bad")
    assert found.share == 0.1
    assert (found.low, found.high) == pytest.approx(clopper_pearson(100, 1000), abs=5e-4)
    none = interval([(Drawn(1, 1, 0.01), tally((1000, 0)))], "bad")
    assert (none.low, none.high) == pytest.approx(clopper_pearson(0, 1000), abs=1e-9)
    every = interval([(Drawn(1, 1, 0.01), tally((1000, 1000)))], "bad")
    assert (every.low, every.high) == pytest.approx(clopper_pearson(1000, 1000), abs=1e-9)


def test_parts_that_are_all_good_or_all_bad_count_as_one_document_each() -> None:
    found = interval([(Drawn(10_000, 40, 1.0), tally(*[(100, 100)] * 10, *[(100, 0)] * 30))], "bad")
    low, high = clopper_pearson(10, 40)
    assert found.low == pytest.approx(low, abs=0.03)
    assert found.high == pytest.approx(high, abs=0.03)
    # Where nothing bad was met, a part full of it may still be among those that were not read.
    none = interval([(Drawn(10_000, 40, 1.0), tally(*[(100, 0)] * 40))], "bad")
    assert none.high == pytest.approx(clopper_pearson(0, 40)[1], abs=1e-6)
    # But never more than was not read.
    assert interval([(Drawn(41, 40, 1.0), tally(*[(100, 0)] * 40))], "bad").high <= 1 / 41 + 1e-9


def test_documents_of_parts_that_are_alike_count_one_by_one() -> None:
    parts = [(100, 10 + (-1) ** number) for number in range(400)]
    found = interval([(Drawn(100_000, 400, 1.0), tally(*parts))], "bad")
    assert found.high - found.low < 0.022  # the binomial one has 0.006; the rest is what may not have been met


def test_strata_weigh_as_much_as_they_stand_for() -> None:
    small, large = (Drawn(1, 1, 1.0), tally((100, 100))), (Drawn(900, 9, 1.0), tally(*[(1, 0)] * 9))
    assert documents_of([small, large]) == 1000
    found = interval([small, large], "bad")
    assert found.share == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1, abs=0.06)
    assert found.high > 0.3
