"""Health by losses alone: no healthy curve goes back, a divergence does, and a life goes on as the one before."""

from __future__ import annotations

import json
import math
import random
from statistics import median

import pytest
from tiny import run_config

from rxt_dist.config.run import RunConfig
from rxt_dist.train.health import LEAST, WINDOW, Health

SPIKES = 10


def health_of(state: dict | None = None, **changes: float) -> Health:
    return Health(run_config(max_skipped_steps=3, **changes), state)


def feed(health: Health, losses, first: int = 1, rows: int = 8, segment=(0, 8)) -> int | None:
    """Give it these losses; the step at which it says to go back."""
    for step, loss in enumerate(losses, first):
        health.begin(step, (step - 1) * rows, segment)
        health.observe(loss is not None, math.nan if loss is None else loss)
        if health.verdict:
            return step
    return None


def student(chance: random.Random, freedom: int) -> float:
    """A number of Student's distribution: the fewer degrees of freedom, the heavier its tails."""
    return chance.gauss(0, 1) / math.sqrt(sum(chance.gauss(0, 1) ** 2 for _ in range(freedom)) / freedom)


def healthy(kind: str, seed: int) -> list[float]:
    """1,000 losses of a run that learns, with noise."""
    chance, drift, losses = random.Random(seed), 0.0, []
    for step in range(1000):
        loss = 2.0 + 8.0 / (1 + step / 50)
        if kind == "heavy tails":
            loss += 0.05 * student(chance, 2)
        elif kind == "slow waves":
            drift = 0.98 * drift + 0.02 * chance.gauss(0, 1)
            loss += drift + 0.02 * chance.gauss(0, 1)
        elif kind == "spikes that pass":
            loss += 0.03 * chance.gauss(0, 1) + (6.0 * 0.6 ** (step % 97) if step % 97 < 8 else 0.0)
        elif kind == "a plateau":
            loss = 2.0 + 1e-4 * chance.gauss(0, 1)
        losses.append(loss)
    return losses


@pytest.mark.parametrize("kind", ["heavy tails", "slow waves", "spikes that pass", "a plateau"])
@pytest.mark.slow
def test_no_healthy_curve_goes_back(kind):
    """10,000 losses of each kind."""
    for seed in range(10):
        assert feed(health_of(), healthy(kind, seed)) is None, seed


@pytest.mark.parametrize("kind", ["heavy tails", "slow waves", "spikes that pass", "a plateau"])
@pytest.mark.slow
def test_a_divergence_goes_back(kind):
    """A loss that rises by 1 % a step, and one that jumps to the level of a network that knows nothing."""
    for seed in range(10):
        before = healthy(kind, seed)[:600]
        rising = [median(before[-50:]) * 1.01**step for step in range(1, 200)]
        at = feed(health_of(), before + rising)
        assert at is not None
        assert at <= 600 + 110
        assert feed(health_of(), before + [11.0] * 20) == 600 + SPIKES


def test_what_it_goes_back_to_lies_two_steps_before_the_streak():
    """The update before the streak may be what spoilt the weights, and the data of that step too."""
    health = health_of()
    assert feed(health, [2.0] * 60 + [9.0] * 20) == 60 + SPIKES
    streak = health.streak
    assert (streak.step, streak.back_to, streak.row) == (61, 59, 59 * 8)
    health = health_of()
    assert feed(health, [2.0, 2.0, None, None, None]) == 5
    assert (health.streak.back_to, health.streak.row) == (1, 8)
    assert "3 updates in a row were not finite" in health.verdict


def test_a_good_update_ends_a_streak_and_high_losses_do_not_raise_the_threshold():
    health = health_of()
    feed(health, [2.0 + 0.01 * (step % 3) for step in range(60)])
    threshold = health.threshold
    assert feed(health, [9.0] * (SPIKES - 1), first=61) is None
    assert health.streak.spikes == SPIKES - 1
    assert not health.skipping
    assert health.threshold == threshold
    assert feed(health, [2.0], first=70) is None
    assert health.streak is None
    assert feed(health, [None, None], first=71) is None
    assert health.skipping


def test_there_is_no_threshold_before_there_are_enough_losses_nor_after_the_level_may_have_changed():
    health = health_of()
    feed(health, [2.0] * (LEAST - 1))
    assert health.threshold is None
    feed(health, [2.0], first=LEAST)
    assert health.threshold == pytest.approx(2.2)
    assert feed(health, [9.0] * 3 * SPIKES, first=LEAST + 1, segment=(1, 8)) is None
    assert feed(health, [2.0] * 5, first=200, segment=(1, 16)) is None
    assert health.threshold is None


def test_a_loss_that_is_no_number_is_high_even_without_a_threshold():
    health = health_of()
    health.begin(1, 0, (0, 8))
    health.observe(True, math.inf)
    assert health.streak.spikes == 1
    json.dumps(health.state(), allow_nan=False)


def test_a_life_judges_as_the_one_before_would_have():
    losses = healthy("heavy tails", 3)[:300] + [30.0] * 20
    whole = health_of()
    at = feed(whole, losses)
    for cut in (1, 40, WINDOW + 5, 304):
        first = health_of()
        assert feed(first, losses[:cut]) is None
        second = health_of(json.loads(json.dumps(first.state(), allow_nan=False)))
        assert feed(second, losses[cut:], first=cut + 1) == at
        assert second.state() == whole.state()


@pytest.mark.parametrize("turned", [{"lr": 1e-5}, {"clip": 0.5}])
def test_another_rate_or_clip_ends_a_streak(turned):
    health = health_of()
    feed(health, [2.0] * 60 + [9.0] * 9)
    assert health_of(health.state()).streak.spikes == 9
    assert health_of(health.state(), **turned).streak is None


def test_checkpoints_from_before_health_begin_with_nothing():
    assert health_of({}).threshold is None
    assert isinstance(run_config(), RunConfig)
