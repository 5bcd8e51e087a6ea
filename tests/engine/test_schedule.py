from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from rxt_dist.config.run import RampConfig, ScheduleConfig, TrainConfig
from rxt_dist.engine.schedule import batch_rows, learning_rate

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


def test_the_batch_grows_at_exact_positions_and_stays() -> None:
    rows = batch_rows(RAMP, 64)
    # Three enlargements over 300 rows: after 100, 200 and 300.
    for position, wanted in ((0, 8), (99, 8), (100, 16), (199, 16), (200, 24), (299, 24), (300, 32), (10**9, 32)):
        assert rows(position) == wanted, position
    sizes = [rows(position) for position in range(400)]
    assert sizes == sorted(sizes)
    assert [rows(position) for position in reversed(range(400))] == sizes[::-1]


def test_without_a_ramp_the_batch_is_full_from_the_start() -> None:
    rows = batch_rows(RAMP.model_copy(update={"ramp": None}), 64)
    assert {rows(position) for position in (0, 1, 10**9)} == {32}


def test_threads_do_not_mix_their_answers_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop and its prefetching thread ask the same function for different positions."""
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator as Calculator

    update = Calculator.update

    def slow_update(self: Calculator, position: int, consistency_check: bool, verbose: bool = False) -> None:
        update(self, position, consistency_check, verbose)
        time.sleep(0.001)  # Lets the other threads run between the question and the answer.

    monkeypatch.setattr(Calculator, "update", slow_update)
    rows = batch_rows(RAMP, 64)
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(rows, [0, 150, 250, 1000] * 10))
    assert answers == [8, 16, 24, 32] * 10
