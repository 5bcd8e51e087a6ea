from __future__ import annotations

from itertools import pairwise

import pytest

from rxt_dist.config.run import RampConfig, ScheduleConfig, TrainConfig
from rxt_dist.config.schedules import count_steps, learning_rate, steps

PEAK, TOTAL = 2e-3, 10_000
COSINE = ScheduleConfig(kind="cosine", warmup_tokens=1000, min_ratio=0.1)
WSD = ScheduleConfig(kind="wsd", warmup_tokens=1000, decay_tokens=2000, min_ratio=0.1)
BOTH = pytest.mark.parametrize("schedule", [COSINE, WSD], ids=["cosine", "wsd"])


def rate(schedule: ScheduleConfig, tokens: int) -> float:
    return learning_rate(schedule, PEAK, TOTAL, tokens)


@BOTH
def test_warm_up_is_a_line_that_reaches_the_peak(schedule: ScheduleConfig) -> None:
    assert [rate(schedule, tokens) / PEAK for tokens in (0, 250, 500, 1000)] == pytest.approx([0, 0.25, 0.5, 1])


@pytest.mark.parametrize(
    ("schedule", "tokens", "share"),
    [
        (COSINE, 1000 + 9000 // 3, 0.1 + 0.9 * 0.75),
        (COSINE, 5500, 0.55),
        (COSINE, 10_000, 0.1),
        (WSD, 8000, 1.0),
        (WSD, 9000, 0.55),
        (WSD, 9500, 0.325),
        (WSD, 10_000, 0.1),
    ],
)
def test_values_after_the_warm_up(schedule: ScheduleConfig, tokens: int, share: float) -> None:
    assert rate(schedule, tokens) == pytest.approx(share * PEAK)


@BOTH
def test_it_falls_and_never_rises_again_even_after_the_end(schedule: ScheduleConfig) -> None:
    rates = [rate(schedule, tokens) for tokens in range(1000, 3 * TOTAL, 100)]
    assert all(later <= earlier for earlier, later in pairwise(rates))
    assert all(rate(schedule, tokens) == pytest.approx(0.1 * PEAK) for tokens in (TOTAL, TOTAL + 1, 2 * TOTAL, 10**9))


@BOTH
def test_it_depends_on_the_tokens_alone(schedule: ScheduleConfig) -> None:
    ascending = [rate(schedule, tokens) for tokens in range(0, 20_000, 37)]
    assert [rate(schedule, tokens) for tokens in reversed(range(0, 20_000, 37))] == ascending[::-1]


@pytest.mark.parametrize(
    "schedule", [ScheduleConfig(kind="wsd"), ScheduleConfig(kind="cosine", warmup_tokens=TOTAL)], ids=["wsd", "cosine"]
)
def test_a_schedule_without_a_decay_has_a_rate_beyond_its_end(schedule: ScheduleConfig) -> None:
    assert rate(schedule, TOTAL) == PEAK
    assert rate(schedule, TOTAL + 1) == pytest.approx(0.1 * PEAK)


RAMP = TrainConfig(
    total_tokens=10**6,
    global_batch_tokens=32 * 64,
    ramp=RampConfig(start_tokens=8 * 64, increment_tokens=8 * 64, over_tokens=300 * 64),
)


def rows_at(train: TrainConfig, position: int) -> int:
    return next(steps(train, 64, position)).rows


@pytest.mark.slow
def test_the_batch_grows_at_exact_positions_and_stays() -> None:
    # Three enlargements over 300 rows: after 100, 200 and 300.
    for position, wanted in ((0, 8), (99, 8), (100, 16), (199, 16), (200, 24), (299, 24), (300, 32), (10**4, 32)):
        assert rows_at(RAMP, position) == wanted, position
    sizes = [rows_at(RAMP, position) for position in range(400)]
    assert sizes == sorted(sizes)
    assert [rows_at(RAMP, position) for position in reversed(range(400))] == sizes[::-1]


def test_without_a_ramp_the_batch_is_full_from_the_start() -> None:
    assert {rows_at(RAMP.model_copy(update={"ramp": None}), position) for position in (0, 1, 10**4)} == {32}


def test_steps_follow_each_other_and_may_be_joined_anywhere() -> None:
    whole = list(steps(RAMP, 64))
    assert whole[0].first == 0
    assert all(step.end == following.first for step, following in pairwise(whole))
    assert list(steps(RAMP, 64, whole[20].first)) == whole[20:]
    assert [step.last for step in whole] == [False] * (len(whole) - 1) + [True]


@pytest.mark.parametrize(("rows", "wanted"), [(10, 2), (8, 2), (7, 1), (11, 2), (12, 3)])
def test_a_batch_beyond_the_budget_is_not_begun(rows: int, wanted: int) -> None:
    train = TrainConfig(total_tokens=rows * 64 + 5, global_batch_tokens=4 * 64)
    taken = list(steps(train, 64))
    assert (len(taken), count_steps(train, 64)) == (wanted, wanted)
    assert [step.last for step in taken] == [False] * (wanted - 1) + [True]
    assert taken[-1].end <= rows


def test_steps_of_a_ramp_are_counted_as_they_are_taken() -> None:
    for rows in (*range(30, 60), *range(390, 440)):
        train = RAMP.model_copy(update={"total_tokens": rows * 64})
        assert count_steps(train, 64) == len(list(steps(train, 64))), rows


def test_steps_of_an_endless_run_are_counted_at_once() -> None:
    endless = RAMP.model_copy(update={"total_tokens": 2**62})
    assert count_steps(endless, 64) == 24 + (2**56 - 320) // 32  # 24 steps ramp up, over 320 rows


def test_two_iterations_do_not_mix_up_their_sizes() -> None:
    """The loop and its prefetching thread iterate over the same steps at different places."""
    alone = list(steps(RAMP, 64))
    first, second = steps(RAMP, 64), steps(RAMP, 64, alone[-3].first)
    mixed = [(next(first), next(second)) for _ in range(3)]
    assert [one for one, _ in mixed] == alone[:3]
    assert [other for _, other in mixed] == alone[-3:]
