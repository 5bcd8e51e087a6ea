"""The global order: which row of which source stands at global position p.

Position p is one row. Step s of a global batch of B rows takes positions [p, p + B) and rank r of W takes its
contiguous slice of them; nothing here knows of W or B, so any number of ranks sees the same stream. The order is a pure
function of (sources, phases, seed, position): nothing is stored, nothing is advanced, a resume needs one integer.

Two levels. The mixture: positions come in blocks of 4,096, a block holds an exact number of rows of every source, and
a keyed permutation mixes them inside the block. The rows: the o-th row drawn from a source of n rows is row
permutation(epoch = o // n)(o % n). Permutations are Feistel networks: no memory and no set-up at any size; a source of
at most 65,536 rows takes a real shuffled table instead, because six rounds are not uniform on tiny domains.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.data.format import digest_json
from rxt_dist.errors import ConfigError, DataError

BLOCK = 4096
WEIGHT_ONE = 1 << 32
MIN_WEIGHT = WEIGHT_ONE // BLOCK  # below one row a block, exact shares would need a negative count in some block
TABLE_ROWS = 65_536

_TABLES_KEPT = 16
_BLOCKS_KEPT = 4
_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

Int64Array = npt.NDArray[np.int64]
Uint64Array = npt.NDArray[np.uint64]


# ---------------------------------------------------------------------------------------------------------------------
# Permutations
# ---------------------------------------------------------------------------------------------------------------------


def _keys(seed: int, epoch: int, stream: str, count: int) -> list[int]:
    digest = hashlib.shake_256(f"rxt-shuffle-v1|{seed}|{epoch}|{stream}".encode()).digest(8 * count)
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


def mix64(values: Uint64Array) -> Uint64Array:
    """splitmix64's finaliser, elementwise on uint64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class Feistel:
    """A keyed permutation of [0, n) by six alternating rounds on (L, R), x = L * b + R, with cycle walking.

    `a = ceil(sqrt n)`, `b = ceil(n / a)`, so at most a few values in a thousand are walked again. The round function is
    splitmix64's finaliser; a linear one fails shuffle tests by hundreds of standard deviations.
    """

    def __init__(self, n: int, seed: int, epoch: int, stream: str) -> None:
        assert 0 < n < 1 << 62, n
        self.n = n
        self._a = math.isqrt(n - 1) + 1
        self._b = -(-n // self._a)
        self._keys = [np.uint64(key) for key in _keys(seed, epoch, stream, 6)]

    def __call__(self, values: Int64Array) -> Int64Array:
        """The images of `values` (int64 [N], each in [0, n))."""
        return self._walk(values, self._forward)

    def inverse(self, values: Int64Array) -> Int64Array:
        """The x with permutation(x) = value, for each value."""
        return self._walk(values, self._backward)

    def _walk(self, values: Int64Array, step: Any) -> Int64Array:
        result = step(values.astype(np.uint64))
        while (outside := np.flatnonzero(result >= self.n)).size:
            result[outside] = step(result[outside])
        return np.asarray(result.astype(np.int64))

    def _shift(self, half: Uint64Array, key: np.uint64, size: int) -> Uint64Array:
        return ((mix64(half + key) >> np.uint64(32)) * np.uint64(size)) >> np.uint64(32)

    def _forward(self, values: Uint64Array) -> Uint64Array:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = values // b, values % b
        for i, key in enumerate(self._keys):
            if i & 1:
                right = (right + self._shift(left, key, self._b)) % b
            else:
                left = (left + self._shift(right, key, self._a)) % a
        return left * b + right

    def _backward(self, values: Uint64Array) -> Uint64Array:
        a, b = np.uint64(self._a), np.uint64(self._b)
        left, right = values // b, values % b
        for i, key in reversed(list(enumerate(self._keys))):
            if i & 1:
                right = (right + (b - self._shift(left, key, self._b))) % b
            else:
                left = (left + (a - self._shift(right, key, self._a))) % a
        return left * b + right


def shuffled_table(n: int, seed: int, epoch: int, stream: str) -> Int64Array:
    """A Fisher-Yates shuffle of [0, n), n <= 65,536, drawn from splitmix64: int64 [n], about 10 ms at the largest."""
    assert 0 < n <= TABLE_ROWS, n
    (key,) = _keys(seed, epoch, stream, 1)
    steps = np.arange(n, 0, -1, dtype=np.uint64)
    draws = mix64(np.uint64(key) + steps * np.uint64(_GAMMA)) >> np.uint64(32)
    picks = ((draws * steps) >> np.uint64(32)).tolist()
    table = list(range(n))
    for last, pick in zip(range(n - 1, -1, -1), picks, strict=True):
        table[last], table[pick] = table[pick], table[last]
    return np.array(table, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# Mixture
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """`tokens` of training (rows times row length, padding included) with one integer weight a source."""

    tokens: int
    weights: tuple[int, ...]


@dataclass(frozen=True)
class OrderSource:
    """A source as the order sees it: its name keys its permutation, `rows` is its training rows."""

    name: str
    rows: int


@dataclass(frozen=True)
class SourcePlan:
    """What a plan draws from one source: rows and tokens over all phases, share of the whole, passes over it."""

    name: str
    rows: int
    tokens: int
    share: float
    epochs: float


@dataclass(frozen=True)
class _PlacedPhase:
    start: int  # first position
    weights: tuple[int, ...]
    drawn: tuple[int, ...]  # rows of each source consumed by the phases before


def integer_weights(shares: Sequence[float]) -> tuple[int, ...]:
    """Shares (any positive scale) as integers that sum to 2^32, by largest remainder.

    Raises:
        ConfigError: a negative or non-finite share, or none above zero.
    """
    total = math.fsum(shares)
    if not shares or not all(math.isfinite(share) and share >= 0 for share in shares) or total <= 0:
        raise ConfigError(f"The mixture shares {list(shares)} must be numbers >= 0 with at least one above 0.")
    exact = [share / total * WEIGHT_ONE for share in shares]
    weights = [int(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: (weights[i] - exact[i], i))[: WEIGHT_ONE - sum(weights)]:
        weights[index] += 1
    return tuple(weights)


def proportional_weights(rows: Sequence[int]) -> tuple[int, ...]:
    """Weights by size, so that every source is passed over equally often.

    A source below 1/4,096 of the rows cannot stand in every block and gets weight 0; the plan shows it.
    """
    total = sum(rows)
    return integer_weights([count if count * BLOCK >= total else 0 for count in rows])


class GlobalOrder:
    """Maps global positions to (source, row); the last phase goes on for ever.

    The mapping never changes, but recent blocks and permutations are kept: one object serves one thread.

    Args:
        sources: name and training rows of every source, in the dataset's order.
        phases: consumed one after the other; each but the last is rounded up to whole blocks of 4,096 rows.
        seed: of all permutations.
        seq_len: tokens a row, to turn the phases' tokens into rows.
        max_epochs: refuse a plan that passes over any source more often than this.

    Raises:
        ConfigError: weights that do not sum to 2^32 or fall below 1/4,096, a weight on an empty source, or a plan that
            repeats a source more than `max_epochs` times.
    """

    def __init__(
        self,
        sources: Sequence[OrderSource],
        phases: Sequence[Phase],
        seed: int,
        seq_len: int,
        max_epochs: float = 4,
    ) -> None:
        self.sources = tuple(sources)
        self.phases = tuple(phases)
        self.seed = seed
        self.seq_len = seq_len
        self._tables: OrderedDict[tuple[int, int], Int64Array | Feistel] = OrderedDict()
        self._blocks: OrderedDict[int, tuple[Int64Array, Int64Array]] = OrderedDict()
        if not self.sources or not self.phases:
            raise ConfigError("A data order needs at least one source with training rows and at least one phase.")
        for phase in self.phases:
            self._check_phase(phase)
        self._check_epochs(max_epochs)

    def _check_phase(self, phase: Phase) -> None:
        names = [source.name for source in self.sources]
        weights = phase.weights
        if len(weights) != len(names) or sum(weights) != WEIGHT_ONE or min(weights) < 0 or phase.tokens <= 0:
            raise ConfigError(
                f"The mixture phase of {phase.tokens} tokens has weights {list(weights)} for the sources {names}; it "
                f"needs tokens above 0 and one weight >= 0 a source, summing to 2^32 (use integer_weights)."
            )
        for source, weight in zip(self.sources, weights, strict=True):
            if weight and not source.rows:
                raise ConfigError(f"Source '{source.name}' has no training rows; give it weight 0 in the mixture.")
            if 0 < weight < MIN_WEIGHT:
                raise ConfigError(
                    f"Source '{source.name}' has a share of {weight / WEIGHT_ONE:.3g}; the smallest share that can be "
                    f"kept exactly is 1/{BLOCK} ({1 / BLOCK:.3g}). Raise it, or give the source weight 0."
                )

    def _check_epochs(self, max_epochs: float) -> None:
        for plan in self.plan():
            if plan.epochs > max_epochs:
                raise ConfigError(
                    f"The plan passes over source '{plan.name}' {plan.epochs:.2f} times ({plan.tokens:,} tokens from "
                    f"{plan.tokens / plan.epochs:,.0f}), more than max_epochs = {max_epochs:g}. Train on fewer tokens, "
                    f"give the source a smaller weight, add data to it, or raise max_epochs knowingly."
                )

    @cached_property
    def _placed(self) -> tuple[_PlacedPhase, ...]:
        placed, start, drawn = [], 0, tuple(0 for _ in self.sources)
        for phase in self.phases:
            placed.append(_PlacedPhase(start, phase.weights, drawn))
            length = -(-self._rows(phase) // BLOCK) * BLOCK
            drawn = tuple(a + b for a, b in zip(drawn, _shares(phase.weights, length), strict=True))
            start += length
        return tuple(placed)

    def _rows(self, phase: Phase) -> int:
        return -(-phase.tokens // self.seq_len)

    @cached_property
    def total_rows(self) -> int:
        """Rows of the whole plan (the last phase's own length, not rounded to a block)."""
        return self._placed[-1].start + self._rows(self.phases[-1])

    def plan(self) -> tuple[SourcePlan, ...]:
        """What the phases draw from each source."""
        last = self._placed[-1]
        final = _shares(last.weights, self._rows(self.phases[-1]))
        drawn = [a + max(b, 0) for a, b in zip(last.drawn, final, strict=True)]
        return tuple(
            SourcePlan(
                source.name, rows, rows * self.seq_len, rows / self.total_rows, rows / source.rows if rows else 0.0
            )
            for source, rows in zip(self.sources, drawn, strict=True)
        )

    def rows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Source index and row (both int64 [N]) at each global position (int64 [N], any order, >= 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.ndim == 1, positions.shape
        assert positions.min(initial=0) >= 0, "a global position is never negative"
        source_N = np.empty_like(positions)
        ordinal_N = np.empty_like(positions)
        blocks = positions // BLOCK
        for block, here in _groups(blocks):
            slots = positions[here] % BLOCK
            block_sources, block_ordinals = self._block(block)
            source_N[here], ordinal_N[here] = block_sources[slots], block_ordinals[slots]
        row_N = np.empty_like(positions)
        for index, source in enumerate(self.sources):
            here = np.flatnonzero(source_N == index)
            if here.size:
                row_N[here] = self._source_rows(index, source, ordinal_N[here])
        return source_N, row_N

    def _block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """Source and ordinal of all 4,096 slots of a block; consecutive calls fall into the same one or two blocks.

        The permutation mixes the sources; each source's ordinals rise with the slot, so that even a corpus smaller
        than a block is read whole before any row of it comes again.
        """
        if block not in self._blocks:
            start = block * BLOCK
            phase = next(phase for phase in reversed(self._placed) if phase.start <= start)
            before = _shares(phase.weights, start - phase.start)
            after = _shares(phase.weights, start - phase.start + BLOCK)
            ends = np.cumsum(np.array(after, dtype=np.int64) - np.array(before, dtype=np.int64))
            shuffled = Feistel(BLOCK, self.seed, block, "block")(np.arange(BLOCK))
            sources = np.searchsorted(ends, shuffled, side="right")
            ordinals = np.empty_like(sources)
            for index, first in enumerate(np.array(before) + np.array(phase.drawn)):
                here = np.flatnonzero(sources == index)
                ordinals[here] = first + np.arange(here.size)
            self._blocks[block] = (sources, ordinals)
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return self._blocks[block]

    def _source_rows(self, index: int, source: OrderSource, ordinals: Int64Array) -> Int64Array:
        epochs, offsets = ordinals // source.rows, ordinals % source.rows
        result = np.empty_like(ordinals)
        for epoch, here in _groups(epochs):
            permutation = self._permutation(index, source, epoch)
            values = offsets[here]
            result[here] = permutation(values) if isinstance(permutation, Feistel) else permutation[values]
        return result

    def _permutation(self, index: int, source: OrderSource, epoch: int) -> Int64Array | Feistel:
        key = (index, epoch)
        if key not in self._tables:
            make = shuffled_table if source.rows <= TABLE_ROWS else Feistel
            self._tables[key] = make(source.rows, self.seed, epoch, source.name)
            if len(self._tables) > max(_TABLES_KEPT, 2 * len(self.sources)):
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def plan_hash(self, position: int) -> str:
        """Hex sha256 of everything that decided positions [0, position).

        Phases that begin later are not in it, so the future of a mixture may change on a resume and its past may not.
        """
        begun = [[phase.start, list(phase.weights)] for phase in self._placed if phase.start < position]
        names = [[source.name, source.rows] for source in self.sources]
        return digest_json(["rxt-order-v1", BLOCK, self.seed, self.seq_len, names, begun])


def _groups(values: Int64Array) -> Iterator[tuple[int, Int64Array]]:
    """Each distinct value with the indices where it stands."""
    by_value = np.argsort(values, kind="stable")
    distinct, starts = np.unique(values[by_value], return_index=True)
    yield from zip(distinct.tolist(), np.split(by_value, starts[1:]), strict=True)


def _shares(weights: Sequence[int], length: int) -> tuple[int, ...]:
    """Rows of each source among the first `length` positions of a phase: exact, in Python integers."""
    result, cumulative, before = [], 0, 0
    for weight in weights:
        cumulative += weight
        upto = (cumulative * length) >> 32
        result.append(upto - before)
        before = upto
    return tuple(result)


# ---------------------------------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataState:
    """Where training stands in the data: the same few hundred bytes on every rank and at any world size.

    `position` counts rows delivered to the optimizer (never rows that were only prefetched).
    """

    position: int
    tokens_seen: int
    seed: int
    dataset_digest: str
    plan_hash: str

    @staticmethod
    def at(order: GlobalOrder, dataset_digest: str, position: int, tokens_seen: int) -> DataState:
        """The state after `position` rows of this order."""
        return DataState(position, tokens_seen, order.seed, dataset_digest, order.plan_hash(position))

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @staticmethod
    def from_dict(value: dict[str, Any]) -> DataState:
        """The inverse of `to_dict`.

        Raises:
            DataError: a field is missing or unknown.
        """
        fields = set(DataState.__dataclass_fields__)
        if set(value) != fields:
            raise DataError(
                f"The saved data state has the fields {sorted(value)}; expected are {sorted(fields)}. It was written "
                f"by another version of this program."
            )
        return DataState(**value)

    def check(self, order: GlobalOrder, dataset_digest: str) -> None:
        """Refuse to go on with data that is not the data this state was made with.

        Raises:
            DataError: naming the field that differs.
        """
        now = DataState.at(order, dataset_digest, self.position, self.tokens_seen)
        reasons = {
            "dataset_digest": "the shards are not the ones training began with",
            "seed": "the data seed was changed",
            "plan_hash": "sources, row length or the mixture of the part already consumed were changed",
        }
        for field, reason in reasons.items():
            saved, present = getattr(self, field), getattr(now, field)
            if saved != present:
                raise DataError(
                    f"Cannot continue at data position {self.position}: {field} was {saved} and is now {present} "
                    f"({reason}). Restore it, or start a new run."
                )
