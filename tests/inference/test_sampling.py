"""Temperature, top-k, top-p, seeds, and values out of range."""

from __future__ import annotations

import math

import pytest
import torch

from rxt_dist.errors import ConfigError
from rxt_dist.inference.sampling import Sampling, choose

LOGITS = torch.tensor([0.0, 3.0, 1.0, 3.0, 2.0, -1.0])


def drawn(sampling: Sampling, logits: torch.Tensor = LOGITS, times: int = 400) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    return [choose(logits, sampling, generator) for _ in range(times)]


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    assert set(drawn(Sampling())) == {1}
    assert choose(LOGITS, Sampling(), torch.Generator(), torch.tensor([1, 3])) == 4


def test_top_k_keeps_ties() -> None:
    assert set(drawn(Sampling(temperature=1.0, top_k=1))) == {1, 3}
    assert set(drawn(Sampling(temperature=1.0, top_k=3))) == {1, 3, 4}
    assert set(drawn(Sampling(temperature=9.0, top_k=99))) == set(range(6))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.1, {0}), (0.5, {0}), (0.55, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_token_that_passes_it(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert set(drawn(Sampling(temperature=1.0, top_p=top_p), logits, 600)) == kept


def test_top_p_counts_after_top_k_and_temperature() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert set(drawn(Sampling(temperature=1.0, top_k=2, top_p=0.56), logits)) == {0}
    assert set(drawn(Sampling(temperature=1.0, top_k=2, top_p=0.58), logits)) == {0, 1}
    assert set(drawn(Sampling(temperature=0.1, top_p=0.9), logits)) == {0}


@pytest.mark.slow
def test_shares_are_those_of_the_softmax() -> None:
    found = drawn(Sampling(temperature=2.0), times=20_000)
    expected = (LOGITS / 2).softmax(-1)
    for token in range(6):
        assert found.count(token) / 20_000 == pytest.approx(expected[token].item(), abs=0.012)


def test_a_seed_gives_the_same_tokens() -> None:
    assert drawn(Sampling(temperature=1.0)) == drawn(Sampling(temperature=1.0))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ],
)
def test_values_out_of_range(values: dict[str, float], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Sampling(**values)  # type: ignore[arg-type]
