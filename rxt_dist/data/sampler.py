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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rxt_dist.config.phases import BLOCK
from rxt_dist.data.manifest import digest_json
from rxt_dist.errors import ConfigError, DataError

WEIGHT_ONE = 1 << 32
MIN_WEIGHT = WEIGHT_ONE // BLOCK  # below one row a block, exact shares would need a negative count in some block
TABLE_ROWS = 65_536

_TABLES_KEPT = 16
_BLOCKS_KEPT = 4
_GAMMA = 0x9E3779B97F4A7C15
_MIX_STEPS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_MIX_LAST, _HALF = np.uint64(31), np.uint64(32)

Int64Array = npt.NDArray[np.int64]
Uint64Array = npt.NDArray[np.uint64]

_SLOTS: Int64Array = np.arange(BLOCK)


# ---------------------------------------------------------------------------------------------------------------------
# Permutations
# ---------------------------------------------------------------------------------------------------------------------


def _keys(seed: int, epoch: int, stream: str, count: int) -> list[int]:
    digest = hashlib.shake_256(f"rxt-shuffle-v1|{seed}|{epoch}|{stream}".encode()).digest(8 * count)
    return [int.from_bytes(digest[8 * i : 8 * i + 8], "little") for i in range(count)]


def mix64(values: Uint64Array) -> Uint64Array:
    """splitmix64's finaliser, elementwise on uint64."""
    result = values.copy()
    _mix64_in_place(result, np.empty_like(result))
    return result


def _mix64_in_place(values: Uint64Array, spare: Uint64Array) -> None:
    for shift, factor in _MIX_STEPS:
        np.right_shift(values, shift, out=spare)
        values ^= spare
        values *= factor
    np.right_shift(values, _MIX_LAST, out=spare)
    values ^= spare


class Feistel:
    """A keyed permutation of [0, n) by six alternating rounds on (L, R), x = L * b + R, with cycle walking.

    `a = ceil(sqrt n)`, `b = ceil(n / a)`, so at most a few values in a thousand are walked again. The round function is
    splitmix64's finaliser; a linear one fails shuffle tests by hundreds of standard deviations.
    """

    def __init__(self, n: int, seed: int, epoch: int, stream: str) -> None:
        assert 0 < n < 1 << 62, n
        self.n = n
        first = math.isqrt(n - 1) + 1
        self._a, self._b = np.uint64(first), np.uint64(-(-n // first))
        self._keys = [np.uint64(key) for key in _keys(seed, epoch, stream, 6)]

    def __call__(self, values: Int64Array) -> Int64Array:
        """The images of `values` (int64 [N], each in [0, n)): about 30 ns each."""
        return self._walk(values, self._forward)

    def inverse(self, values: Int64Array) -> Int64Array:
        """The x with permutation(x) = value, for each value."""
        return self._walk(values, self._backward)

    def _walk(self, values: Int64Array, step: Callable[[Uint64Array], Uint64Array]) -> Int64Array:
        result = step(values.astype(np.uint64))
        while (outside := np.flatnonzero(result >= self.n)).size:
            result[outside] = step(result[outside])
        return result.view(np.int64)

    def _forward(self, values: Uint64Array) -> Uint64Array:
        left, right, work, spare = self._halves(values)
        for i, key in enumerate(self._keys):
            here, other, size = (right, left, self._b) if i & 1 else (left, right, self._a)
            here += self._shift(other, key, size, work, spare)
            # Both terms are below `size`, so one subtraction reduces; where it is too much it wraps to a huge value.
            np.subtract(here, size, out=spare)
            np.minimum(here, spare, out=here)
        left *= self._b
        left += right
        return left

    def _backward(self, values: Uint64Array) -> Uint64Array:
        left, right, work, spare = self._halves(values)
        for i, key in reversed(list(enumerate(self._keys))):
            here, other, size = (right, left, self._b) if i & 1 else (left, right, self._a)
            here -= self._shift(other, key, size, work, spare)
            np.add(here, size, out=spare)
            np.minimum(here, spare, out=here)
        left *= self._b
        left += right
        return left

    def _halves(self, values: Uint64Array) -> tuple[Uint64Array, Uint64Array, Uint64Array, Uint64Array]:
        """L and R of x = L * b + R, and two arrays of their size to compute in."""
        left = values // self._b
        work = left * self._b
        return left, values - work, work, np.empty_like(left)

    @staticmethod
    def _shift(
        half: Uint64Array, key: np.uint64, size: np.uint64, work: Uint64Array, spare: Uint64Array
    ) -> Uint64Array:
        """The round function, in [0, size); the result lies in `work`."""
        np.add(half, key, out=work)
        _mix64_in_place(work, spare)
        work >>= _HALF
        work *= size
        work >>= _HALF
        return work


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
    """A source as the order sees it: its name keys its permutation, `rows` is its training rows.

    dataset: number of its dataset, in the order in which the phases first read them.
    """

    name: str
    rows: int
    dataset: int = 0


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
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not any(shares):
        raise ConfigError(f"The mixture shares {list(shares)} must be numbers >= 0 with at least one above 0.")
    # A power of two changes no quotient, and keeps the sum of huge shares finite.
    exponent = math.frexp(max(shares))[1]
    scaled = [math.ldexp(share, -exponent) for share in shares]
    total = math.fsum(scaled)
    exact = [share / total * WEIGHT_ONE for share in scaled]
    weights = [int(value) for value in exact]
    for index in sorted(range(len(exact)), key=lambda i: (weights[i] - exact[i], i))[: WEIGHT_ONE - sum(weights)]:
        weights[index] += 1
    return tuple(weights)


def proportional_weights(rows: Sequence[int]) -> tuple[int, ...]:
    """Weights by size, so that every source is passed over equally often.

    A source below 1/4,096 of the rows cannot stand in every block and gets weight 0; the plan shows it.

    Raises:
        ConfigError: no rows, or none of so many sources has 1/4,096 of them.
    """
    total = sum(rows)
    if not total:
        raise ConfigError("There are no training rows: lower build.eval_fraction, or add text.")
    kept = [count if count * BLOCK >= total else 0 for count in rows]
    if not any(kept):
        raise ConfigError(
            f"None of the {len(rows):,} sources holds 1/{BLOCK} of the {total:,} training rows, the least that can "
            f"stand in every block: build them as fewer sources, or name some of them in data.mixture."
        )
    return integer_weights(kept)


class GlobalOrder:
    """Maps global positions to (source, row); the last phase goes on for ever.

    The mapping never changes, but recent blocks and permutations are kept: one object serves one thread.

    Args:
        sources: name and training rows of every source, in the order of datasets and of each dataset.
        phases: consumed one after the other; each but the last is rounded up to whole blocks of 4,096 rows.
        seed: of all permutations.
        seq_len: tokens a row, to turn the phases' tokens into rows.
        max_epochs: refuse a plan that passes over any source more often than this, a row of rounding a phase aside.

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
        datasets = [source.dataset for source in self.sources]
        assert datasets == sorted(datasets), "sources of a later dataset stand after those of an earlier one"
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
                    f"Source '{source.name}' has a share of {weight / WEIGHT_ONE:.9g}; the smallest share that can be "
                    f"kept exactly is 1/{BLOCK} ({1 / BLOCK:.9g}). Raise it, or give the source weight 0."
                )

    def _check_epochs(self, max_epochs: float) -> None:
        for plan, source in zip(self.plan(), self.sources, strict=True):
            # Shares are cut to whole rows, which can give a source up to one row more in each phase.
            if plan.rows > max_epochs * source.rows + len(self.phases):
                raise ConfigError(
                    f"The plan passes over source '{plan.name}' {plan.epochs:.6g} times ({plan.tokens:,} tokens from "
                    f"{source.rows * self.seq_len:,}), more than max_epochs = {max_epochs:g}. Train on fewer tokens, "
                    f"give the source a smaller weight, add data to it, or raise max_epochs knowingly."
                )

    @cached_property
    def _placed(self) -> tuple[_PlacedPhase, ...]:
        placed, start, drawn = [], 0, tuple(0 for _ in self.sources)
        for phase, length in zip(self.phases, self.phase_rows, strict=True):
            placed.append(_PlacedPhase(start, phase.weights, drawn))
            drawn = tuple(a + b for a, b in zip(drawn, _shares(phase.weights, length), strict=True))
            start += length
        return tuple(placed)

    @cached_property
    def phase_rows(self) -> tuple[int, ...]:
        """Rows of each phase as they are read: whole blocks, but for the last its own length."""
        *before, last = (-(-phase.tokens // self.seq_len) for phase in self.phases)
        return (*(-(-rows // BLOCK) * BLOCK for rows in before), last)

    @cached_property
    def total_rows(self) -> int:
        """Rows of the whole plan."""
        return sum(self.phase_rows)

    def plan(self) -> tuple[SourcePlan, ...]:
        """What the phases draw from each source."""
        last = self._placed[-1]
        final = _shares(last.weights, self.phase_rows[-1])
        drawn = [a + b for a, b in zip(last.drawn, final, strict=True)]
        return tuple(
            SourcePlan(
                source.name, rows, rows * self.seq_len, rows / self.total_rows, rows / source.rows if rows else 0.0
            )
            for source, rows in zip(self.sources, drawn, strict=True)
        )

    def rows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Source index and row (both int64 [R]) at each global position (int64 [R], any order, >= 0)."""
        positions = np.asarray(positions, dtype=np.int64)
        assert positions.ndim == 1, positions.shape
        if not positions.size:
            return positions.copy(), positions.copy()
        first, last = int(positions.min()), int(positions.max())
        assert first >= 0, "a global position is never negative"
        if first // BLOCK == last // BLOCK:
            sources, rows = self._block(first // BLOCK)
            slots = positions % BLOCK
            return sources[slots], rows[slots]
        source_R, row_R = np.empty_like(positions), np.empty_like(positions)
        for block, here in _groups(positions // BLOCK):
            slots = positions[here] % BLOCK
            sources, rows = self._block(block)
            source_R[here], row_R[here] = sources[slots], rows[slots]
        return source_R, row_R

    def epoch(self, position: int) -> int:
        """How many times the source that stands at a position was read whole before it: 0 in its first epoch."""
        block, slot = divmod(position, BLOCK)
        sources, _ = self._block(block)
        source, start = int(sources[slot]), block * BLOCK
        phase = next(phase for phase in reversed(self._placed) if phase.start <= start)
        before = phase.drawn[source] + _shares(phase.weights, start - phase.start)[source]
        return (before + int(np.count_nonzero(sources[:slot] == source))) // self.sources[source].rows

    def _block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """Source and row of all 4,096 slots of a block; consecutive calls fall into the same one or two blocks."""
        found = self._blocks.get(block)
        if found is None:
            found = self._blocks[block] = self._make_block(block)
            if len(self._blocks) > _BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return found

    def _make_block(self, block: int) -> tuple[Int64Array, Int64Array]:
        """The permutation mixes the sources; each source's ordinals rise with the slot, so that even a corpus smaller
        than a block is read whole before any row of it comes again.
        """
        start = block * BLOCK
        phase = next(phase for phase in reversed(self._placed) if phase.start <= start)
        before = _shares(phase.weights, start - phase.start)
        after = _shares(phase.weights, start - phase.start + BLOCK)
        counts = [b - a for a, b in zip(before, after, strict=True)]
        shuffled = Feistel(BLOCK, self.seed, block, "block")(_SLOTS)
        source_of_rank = np.repeat(np.arange(len(counts), dtype=np.uint16), counts)
        sources = source_of_rank[shuffled]
        # Sorting small integers keeps the slots of a source in order and takes numpy one pass.
        slots = np.argsort(sources, kind="stable")
        rows = np.empty(BLOCK, dtype=np.int64)
        rows[slots] = np.concatenate(
            [
                self._source_rows(index, phase.drawn[index] + before[index], count)
                for index, count in enumerate(counts)
                if count
            ]
        )
        return sources.astype(np.int64), rows

    def _source_rows(self, index: int, first: int, count: int) -> Int64Array:
        """Rows of a source's ordinals [first, first + count), pass by pass."""
        source, end = self.sources[index], first + count
        parts = []
        while first < end:
            epoch = first // source.rows
            begin, stop = epoch * source.rows, min(end, (epoch + 1) * source.rows)
            permutation = self._permutation(index, source, epoch)
            offsets = slice(first - begin, stop - begin)
            if isinstance(permutation, Feistel):
                parts.append(permutation(np.arange(offsets.start, offsets.stop)))
            else:
                parts.append(permutation[offsets])
            first = stop
        return np.concatenate(parts)

    def _permutation(self, index: int, source: OrderSource, epoch: int) -> Int64Array | Feistel:
        key = (index, epoch)
        if key not in self._tables:
            make = shuffled_table if source.rows <= TABLE_ROWS else Feistel
            self._tables[key] = make(source.rows, self.seed, epoch, source.name)
            if len(self._tables) > max(_TABLES_KEPT, 2 * len(self.sources)):
                self._tables.popitem(last=False)
        self._tables.move_to_end(key)
        return self._tables[key]

    def datasets_begun(self, position: int) -> int:
        """How many datasets, in their order, the phases that begin before a position read; at least the first."""
        begun = [phase.weights for phase in self._placed if phase.start < position]
        read = (source.dataset for at, source in enumerate(self.sources) if any(weights[at] for weights in begun))
        return 1 + max(read, default=0)

    def plan_hash(self, position: int) -> str:
        """Hex sha256 of everything that decided positions [0, position).

        Phases that begin later and datasets that only they read are not in it, so the future of a mixture may change
        on a resume and its past may not.
        """
        datasets = self.datasets_begun(position)
        names = [[source.name, source.rows] for source in self.sources if source.dataset < datasets]
        begun = [[phase.start, list(phase.weights[: len(names)])] for phase in self._placed if phase.start < position]
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

    `position` counts rows delivered to the optimizer (never rows that were only prefetched). `dataset_digests` are
    those of the datasets that were begun by then, in their order.
    """

    position: int
    tokens_seen: int
    seed: int
    dataset_digests: tuple[str, ...]
    plan_hash: str

    @staticmethod
    def at(order: GlobalOrder, digests: Sequence[str], position: int, tokens_seen: int) -> DataState:
        """The state after `position` rows of this order, of whose datasets these are the digests."""
        begun = tuple(digests[: order.datasets_begun(position)])
        return DataState(position, tokens_seen, order.seed, begun, order.plan_hash(position))

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "dataset_digests": list(self.dataset_digests)}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> DataState:
        """The inverse of `to_dict`; states from before runs could read several datasets name one.

        Raises:
            DataError: a field is missing or unknown.
        """
        known = dict(value)
        if "dataset_digest" in known:
            known["dataset_digests"] = [known.pop("dataset_digest")]
        fields = set(DataState.__dataclass_fields__)
        if set(known) != fields:
            raise DataError(
                f"The saved data state has the fields {sorted(value)}; expected are {sorted(fields)}. It was written "
                f"by another version of this program."
            )
        return DataState(**{**known, "dataset_digests": tuple(known["dataset_digests"])})

    def check(self, order: GlobalOrder, digests: Sequence[str]) -> None:
        """Refuse to go on with data that is not the data this state was made with; what comes later may be another.

        Raises:
            DataError: naming the field that differs, and from where on data may change.
        """
        now = DataState.at(order, digests, self.position, self.tokens_seen)
        reasons = {
            "seed": "the data seed was changed",
            "dataset_digests": "the shards are not the ones training began with",
            "plan_hash": "sources, row length or the mixture of the part already consumed were changed",
        }
        for field, reason in reasons.items():
            saved, present = _shown(getattr(self, field)), _shown(getattr(now, field))
            if saved != present:
                raise DataError(
                    f"Cannot continue at data position {self.position}: {field} was {saved} and is now {present} "
                    f"({reason}). Restore it, or start a new run.{'' if field == 'seed' else self._advice(order)}"
                )

    def _advice(self, order: GlobalOrder) -> str:
        """From where on another dataset or mixture may be read, and how."""
        tokens = max(1, -(-self.position // BLOCK)) * BLOCK * order.seq_len
        return (
            f" Another dataset or mixture may begin with a phase of its own at {tokens:,} tokens or later: keep "
            f"data.path and the phases as they were up to there (of a run without any: {{tokens: {tokens}, by_size: "
            f"true}}), and add a phase after them to data.mixture, with its dataset as `path`."
        )


def _shown(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)
