"""How sure a share is that was counted in a part of a corpus.

The documents of a sample come in parts (places of files) that were chosen at random, and documents of one part are
alike: a file may be bad from its first line to its last. The interval therefore takes its width from how parts differ
and not from the number of documents, as surveys of households do:

    share      the ratio of two estimated totals, documents that were dropped and documents
    variance   of that ratio, linearised: between the parts of each stratum, and within them where a part of their
               documents was tried; nothing where all were
    interval   Clopper and Pearson's for as many independent documents as would have this variance (Korn and Graubard
               1998), which holds for shares near 0 and 1 too, where a symmetric interval does not

Among what was not read may be something unlike all that was seen: as much of it as is missed by chance once in forty
widens the interval, stratum by stratum, as roots of sums of squares.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

CONFIDENCE = 0.95

_TAIL = (1 - CONFIDENCE) / 2
_BISECTIONS = 60
_TERMS, _EXACT = 10_000, 1e-12


@dataclass(frozen=True)
class Interval:
    """An estimated share of documents, and the bounds between which the true one lies with `CONFIDENCE`."""

    share: float
    low: float
    high: float


@dataclass
class Tally:
    """Sums over the parts of a stratum, of one subset of the documents: what the variance needs.

    `parts` had documents; `documents` were tried, and `squares` is the sum of the squares of each part's number. Of a
    reason: `dropped`, the sum of the squares of each part's (`dropped_squares`), and of its products with the part's
    documents (`products`).
    """

    parts: int = 0
    documents: int = 0
    squares: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_squares: Counter[str] = field(default_factory=Counter)
    products: Counter[str] = field(default_factory=Counter)

    def add_part(self, documents: int, dropped: Counter[str]) -> None:
        """Add one part's documents, and how many of them were dropped for each reason."""
        self.parts += 1
        self.documents += documents
        self.squares += documents * documents
        for reason, count in dropped.items():
            self.dropped[reason] += count
            self.dropped_squares[reason] += count * count
            self.products[reason] += count * documents


@dataclass(frozen=True)
class Drawn:
    """How a stratum's documents were drawn: `read` of its `parts` at random, and of these each document with
    probability `rate`."""

    parts: int
    read: int
    rate: float

    @property
    def weight(self) -> float:
        """Documents of the corpus that one document of the sample stands for."""
        return self.parts / (self.read * self.rate) if self.read else 0.0

    @property
    def unread(self) -> float:
        """Share of the parts that were not read."""
        return 1 - self.read / self.parts

    @property
    def whole(self) -> bool:
        """Whether every document was tried."""
        return self.read == self.parts and self.rate == 1


def documents_of(sample: Iterable[tuple[Drawn, Tally]]) -> float:
    """The estimated number of documents in the corpus."""
    return sum(drawn.weight * tally.documents for drawn, tally in sample)


def interval(sample: Sequence[tuple[Drawn, Tally]], reason: str) -> Interval:
    """The share of the documents that are dropped for a reason, estimated from the strata of a sample.

    At least one document must have been tried.
    """
    sample = [(drawn, tally) for drawn, tally in sample if tally.documents]
    total = documents_of(sample)
    share = sum(drawn.weight * tally.dropped[reason] for drawn, tally in sample) / total
    if all(drawn.whole for drawn, _ in sample):
        return Interval(share, share, share)
    low = high = share
    if 0 < share < 1 and (variance := _variance(sample, reason, share, total)):
        independent = share * (1 - share) / variance
        low, high = clopper_pearson(share * independent, independent)
    more, fewer = high - share, share - low
    for drawn, tally in sample:
        unseen = _unseen(drawn, tally) * drawn.weight * tally.documents / total
        if drawn.unread or not tally.dropped[reason]:
            more = math.hypot(more, unseen * (1 - share))
        if drawn.unread or tally.dropped[reason] == tally.documents:
            fewer = math.hypot(fewer, unseen * share)
    return Interval(share, max(0.0, share - fewer), min(1.0, share + more))


def _unseen(drawn: Drawn, tally: Tally) -> float:
    """How large a share of a stratum's documents may be of a kind that was not met in it: parts, if not all were read,
    whose documents may all be alike, else documents."""
    if drawn.whole:
        return 0.0
    independent = tally.documents**2 / tally.squares if drawn.unread else tally.documents
    return float(min(1 - _TAIL ** (1 / independent), 1 - 1 / drawn.weight))


def _variance(sample: Sequence[tuple[Drawn, Tally]], reason: str, share: float, total: float) -> float:
    """The variance of the estimated share."""
    variance = 0.0
    for drawn, tally in sample:
        dropped, rate = tally.dropped[reason], drawn.rate
        kept = tally.documents - dropped
        within = (dropped * (1 - share) ** 2 + kept * share**2) * (1 - rate) / rate**2
        variance += within * drawn.parts / drawn.read
        if drawn.unread:
            products = tally.products[reason]
            squares = tally.dropped_squares[reason] - 2 * share * products + share**2 * tally.squares
            mean = (dropped - share * tally.documents) / drawn.read
            between = (squares - drawn.read * mean**2) / max(drawn.read - 1, 1) / rate**2
            variance += drawn.parts**2 * drawn.unread * between / drawn.read
    return variance / total**2


# ---------------------------------------------------------------------------------------------------------------------
# Distributions
# ---------------------------------------------------------------------------------------------------------------------


def clopper_pearson(successes: float, trials: float) -> tuple[float, float]:
    """The exact interval of a binomial share; neither has to be an integer."""
    failures = trials - successes
    low = _beta_quantile(successes, failures + 1, _TAIL) if successes > 0 else 0.0
    high = _beta_quantile(successes + 1, failures, 1 - _TAIL) if failures > 0 else 1.0
    return low, high


def _beta_quantile(a: float, b: float, probability: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if incomplete_beta(a, b, middle) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The distribution function of a beta variable, by its continued fraction (Lentz's method)."""
    if not 0 < x < 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # on this side the other tail's fraction converges
        return 1 - incomplete_beta(b, a, 1 - x)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    c, d = 1.0, 1 / _nonzero(1 - (a + b) * x / (a + 1))
    fraction = d
    for term in range(1, _TERMS):
        even = term * (b - term) * x / ((a + 2 * term - 1) * (a + 2 * term))
        odd = -(a + term) * (a + b + term) * x / ((a + 2 * term) * (a + 2 * term + 1))
        for step in (even, odd):
            d = 1 / _nonzero(1 + step * d)
            c = _nonzero(1 + step / c)
            fraction *= c * d
        if abs(c * d - 1) < _EXACT:
            break
    return front * fraction


def _nonzero(value: float) -> float:
    return value if abs(value) > 1e-300 else 1e-300
