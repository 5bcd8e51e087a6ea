"""How random the permutations look: z-scores of what a uniformly random permutation would give, all within 4.

Statistics, over the first positions of a permutation as training consumes them:

- serial: correlation of neighbours' images, at lags 1 and 2.
- bins: chi-square of images over 64 bins; crossed: of positions in 16 bins against images in 16 bins.
- displacement: mean distance between a position and its image.
- ascents: how often an image is larger than the one before it.
- low bit: how many images are odd, and how often neighbours agree in that.
- epochs: correlation with the next epoch's permutation at equal positions.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from rxt_dist.data.sampler import TABLE_ROWS, Feistel, shuffled_table

TAKEN = 131_072
KEYS = range(10)


def images(n: int, seed: int, epoch: int) -> np.ndarray:
    """What the order uses for a source of n rows, and for the blocks of the mixture (4,096)."""
    if n <= TABLE_ROWS and n != 4096:
        return shuffled_table(n, seed, epoch, "source")
    return Feistel(n, seed, epoch, "source")(np.arange(min(n, TAKEN)))


def chi_square_z(counts: np.ndarray, expected: np.ndarray, freedom: int) -> float:
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    # Wilson and Hilferty: the cube root is nearly normal.
    return ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def correlation_z(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) * math.sqrt(len(a))


def scores(n: int, seed: int) -> dict[str, float]:
    values = images(n, seed, 0)
    count, part = len(values), len(values) / n
    at = np.arange(count)
    result = {f"serial {lag}": correlation_z(values[lag:], values[:-lag]) for lag in (1, 2)}
    if count < n:
        bins = np.bincount(values * 64 // n, minlength=64)
        width = np.diff(-(-np.arange(65) * n // 64))
        result["bins"] = chi_square_z(bins, width * part, 63)
    rows, columns = at * 16 // count, values * 16 // n
    crossed = np.bincount(rows * 16 + columns, minlength=256).reshape(16, 16)
    expected = np.outer(np.bincount(rows), np.bincount(columns)) / count
    result["crossed"] = chi_square_z(crossed, expected, 225)
    distance = np.abs(values - at)
    if count == n:
        mean, variance = (n * n - 1) / (3 * n), (n + 1) * (2 * n * n + 7) / 45 / n**2
        result["displacement"] = (distance.mean() - mean) / math.sqrt(variance)
    else:
        # The image of position i is uniform over [0, n) but for the few taken before it.
        mean = ((at * (at + 1) + (n - 1 - at) * (n - at)) / (2 * n)).mean()
        result["displacement"] = (distance.mean() - mean) / (distance.std() / math.sqrt(count))
    ascents = int((values[1:] > values[:-1]).sum())
    result["ascents"] = (ascents - (count - 1) / 2) / math.sqrt((count + 1) / 12)
    odd = values & 1
    if count < n:
        result["low bit"] = (odd.sum() - count / 2) / math.sqrt(count / 4)
    result["low bits agree"] = ((odd[1:] == odd[:-1]).sum() - (count - 1) / 2) / math.sqrt(count / 4)
    result["epochs"] = correlation_z(values, images(n, seed, 1))
    return result


@pytest.mark.parametrize("n", [4096, 50_021, 1_000_003, 48_828_125])
@pytest.mark.slow
def test_shuffles_cannot_be_told_from_random_ones(n: int) -> None:
    worst = {seed: {name: z for name, z in scores(n, seed).items() if not abs(z) < 4} for seed in KEYS}
    assert {seed: found for seed, found in worst.items() if found} == {}


def test_the_statistics_find_a_poor_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A multiplication modulo a prime is a permutation, and no shuffle."""
    n, factor = 1_000_003, 618_033
    monkeypatch.setitem(globals(), "images", lambda n, seed, epoch: np.arange(1, TAKEN + 1) * (factor + epoch) % n)
    assert sum(abs(z) > 4 for z in scores(n, 0).values()) >= 4
