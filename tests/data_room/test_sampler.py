from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.sampler import (
    BLOCK,
    WEIGHT_ONE,
    DataState,
    Feistel,
    GlobalOrder,
    OrderSource,
    Phase,
    integer_weights,
    proportional_weights,
    shuffled_table,
)
from rxt_dist.errors import ConfigError, DataError

SEQ = 256


def _order(rows: dict[str, int], positions: int, shares: list[float] | None = None, **more: object) -> GlobalOrder:
    weights = integer_weights(shares) if shares else proportional_weights(list(rows.values()))
    arguments = {"seed": 3, "seq_len": SEQ, "max_epochs": 10_000} | more
    return GlobalOrder([OrderSource(*item) for item in rows.items()], [Phase(positions * SEQ, weights)], **arguments)


def test_golden_vectors() -> None:
    first = np.arange(8)
    big = [448310, 1276439, 31016599, 5656043, 35466145, 42283525, 21541557, 42603343]
    assert Feistel(48828125, 1234, 0, "fineweb-edu")(first).tolist() == big
    assert Feistel(4096, 7, 3, "block")(first).tolist() == [3992, 1675, 28, 1393, 1248, 175, 3109, 1786]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5000), st.integers(0, 2**63), st.integers(0, 1000))
def test_a_feistel_is_a_bijection_with_an_inverse(n: int, seed: int, epoch: int) -> None:
    permutation = Feistel(n, seed, epoch, "x")
    images = permutation(np.arange(n))
    assert sorted(images.tolist()) == list(range(n))
    assert permutation.inverse(images).tolist() == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 65_536])
def test_a_table_is_a_permutation(n: int) -> None:
    assert np.array_equal(np.sort(shuffled_table(n, 1, 2, "x")), np.arange(n))


def test_small_tables_are_uniform() -> None:
    counts = np.zeros(24)
    index = {}
    for seed in range(6000):
        counts[index.setdefault(tuple(shuffled_table(4, seed, 0, "x").tolist()), len(index))] += 1
    chi_square = ((counts - 250) ** 2 / 250).sum()
    assert chi_square < 50  # 23 degrees of freedom; 50 is p = 0.001


@pytest.mark.parametrize("n", [4096, 100_003, 48_828_125])
def test_shuffles_look_random(n: int) -> None:
    """Parity, half and neighbour statistics within 5 standard deviations; a linear round function gives hundreds."""
    taken = min(n, 100_000)
    values = Feistel(n, 11, 0, "y")(np.arange(taken))
    spread = np.sqrt(taken) / 2
    for bits in (values & 1, values < n // 2, (values >> 3) & 1, (values[1:] > values[:-1]), (values & 1)[1::2]):
        expected = bits.size / 2
        assert abs(bits.sum() - expected) < 5 * spread
    agreement = ((values[1:] & 1) == (values[:-1] & 1)).sum()
    assert abs(agreement - (taken - 1) / 2) < 5 * spread
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 5 / np.sqrt(taken)


def test_epochs_and_sources_have_different_orders() -> None:
    keys = [(1, 0, "en"), (1, 1, "en"), (2, 0, "en"), (1, 0, "pl")]
    assert len({tuple(Feistel(70_000, *key)(np.arange(5)).tolist()) for key in keys}) == 4


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=6).filter(any), st.integers(1, 40))
@pytest.mark.slow
def test_shares_are_exact_at_every_block(shares: list[int], blocks: int) -> None:
    shares = [share if share * BLOCK >= 2 * sum(shares) else 0 for share in shares]
    weights = integer_weights(shares)
    order = _order({f"s{n}": 7_000_000 for n in range(len(shares))}, blocks * BLOCK, shares)
    source, _ = order.rows(np.arange(blocks * BLOCK))
    for upto in {1, blocks // 2, blocks} - {0}:
        total, before, cumulative = upto * BLOCK, 0, 0
        counts = np.bincount(source[:total], minlength=len(shares))
        for weight, count in zip(weights, counts, strict=True):
            cumulative += weight
            end = (cumulative * total) >> 32
            assert count == end - before
            before = end


def test_one_pass_reads_every_row_once_even_of_a_tiny_corpus() -> None:
    for rows in ({"en": 300}, {"en": 66_000}):
        (total,) = rows.values()
        _, row = _order(rows, 3 * total).rows(np.arange(3 * total))
        epochs = row.reshape(3, total)
        for epoch in epochs:
            assert np.array_equal(np.sort(epoch), np.arange(total))
        assert not np.array_equal(epochs[0], epochs[1])


def test_a_mixture_reads_each_source_pass_by_pass() -> None:
    order = _order({"en": 500, "pl": 250}, 8 * BLOCK)
    source, row = order.rows(np.arange(8 * BLOCK))
    for index, size in enumerate((500, 250)):
        drawn = row[source == index]
        for start in range(0, len(drawn) - size, size):
            assert len(set(drawn[start : start + size].tolist())) == size


@pytest.mark.parametrize("splits", [[(1, 8)], [(2, 8)], [(4, 16)], [(8, 24)], [(2, 8), (4, 16), (1, 5)]])
def test_one_stream_for_any_world_size_and_batch(splits: list[tuple[int, int]]) -> None:
    order = _order({"en": 900, "pl": 400}, BLOCK)
    wanted = np.stack(order.rows(np.arange(480)), axis=1)
    position, seen = 0, []
    while position < 480:
        world, batch = splits[(position // 97) % len(splits)]
        local = batch // world
        # A fresh object for every rank: nothing may be carried in it.
        fresh = _order({"en": 900, "pl": 400}, BLOCK)
        for rank in range(world):
            start = position + rank * local
            seen.append(np.stack(fresh.rows(np.arange(start, start + local)), axis=1))
        position += local * world
    assert np.array_equal(np.concatenate(seen)[:480], wanted)


def test_any_order_of_asking_gives_the_same_rows() -> None:
    order = _order({"en": 70_000, "pl": 9000}, 30_000)
    everything = np.stack(order.rows(np.arange(30_000)), axis=1)
    asked = np.random.default_rng(0).permutation(30_000)[:3000]
    assert np.array_equal(np.stack(order.rows(asked), axis=1), everything[asked])


def test_weights_change_between_phases_without_loss_or_repeats() -> None:
    sources = [OrderSource("en", 100_000), OrderSource("pl", 90_000)]
    phases = [Phase(5000 * SEQ, integer_weights([3, 1])), Phase(9000 * SEQ, integer_weights([1, 1]))]
    order = GlobalOrder(sources, phases, 0, SEQ)
    end = 2 * BLOCK + 9000
    assert order.total_rows == end
    source, row = order.rows(np.arange(end))
    assert len(set(zip(source.tolist(), row.tolist(), strict=True))) == end
    assert np.bincount(source[: 2 * BLOCK]).tolist() == [6144, 2048]
    assert np.bincount(source[2 * BLOCK : 4 * BLOCK]).tolist() == [4096, 4096]
    assert [plan.rows for plan in order.plan()] == [6144 + 4500, 2048 + 4500]


def test_plans_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="source 'en' 5"):
        _order({"en": 100}, 500, max_epochs=4)
    with pytest.raises(ConfigError, match="no training rows"):
        _order({"en": 100, "pl": 0}, 100, [1, 1])
    with pytest.raises(ConfigError, match="smallest share"):
        _order({"en": 100, "pl": 100}, 100, [1, 1e-4])
    with pytest.raises(ConfigError, match="2\\^32"):
        GlobalOrder([OrderSource("en", 10)], [Phase(SEQ, (1,))], 0, SEQ)
    with pytest.raises(ConfigError, match=r"share of 0\.00024414.*; the smallest .* 1/4096 \(0\.000244140625\)"):
        GlobalOrder(
            [OrderSource("en", 9), OrderSource("pl", 9)], [Phase(9, (WEIGHT_ONE - (1 << 20) + 1, (1 << 20) - 1))], 0, 1
        )
    for shares in ([0.0, 0.0], [], [1.0, float("inf")], [1.0, -1.0], [float("nan")]):
        with pytest.raises(ConfigError, match="shares"):
            integer_weights(shares)
    with pytest.raises(ConfigError, match=r"no training rows: lower build\.eval_fraction"):
        proportional_weights([0, 0])


def test_shares_of_any_size_are_relative() -> None:
    for scale in (1.0, 1e308, 5e-324):
        assert integer_weights([scale, scale]) == (WEIGHT_ONE // 2, WEIGHT_ONE // 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1000, 100_000), min_size=1, max_size=12))
def test_one_pass_is_not_refused_for_a_row_of_rounding(sizes: list[int]) -> None:
    rows = {f"s{number}": size for number, size in enumerate(sizes)}
    order = _order(rows, sum(sizes), max_epochs=1)
    assert all(abs(plan.rows - size) <= 1 for plan, size in zip(order.plan(), sizes, strict=True))
    with pytest.raises(ConfigError, match="more than max_epochs = 1"):
        _order(rows, sum(sizes) + 3 * len(sizes), max_epochs=1)


def test_a_source_too_small_for_every_block_gets_no_weight() -> None:
    weights = proportional_weights([100_000, 3])
    assert weights == (WEIGHT_ONE, 0)
    assert sum(integer_weights([1, 1, 1])) == WEIGHT_ONE


def test_state_round_trips_and_names_what_differs() -> None:
    order = _order({"en": 900, "pl": 400}, BLOCK)
    state = DataState.at(order, ["digest"], 77, 77 * SEQ)
    assert DataState.from_dict(state.to_dict()) == state
    state.check(order, ["digest"])
    for other, digest, field in (
        (order, "else", "dataset_digests"),
        (_order({"en": 900, "pl": 400}, BLOCK, seed=4), "digest", "seed"),
        (_order({"en": 901, "pl": 400}, BLOCK), "digest", "plan_hash"),
        (_order({"en": 900, "pl": 400}, BLOCK, [1, 1]), "digest", "plan_hash"),
    ):
        with pytest.raises(DataError, match=field):
            state.check(other, [digest])
    with pytest.raises(DataError, match="another version"):
        DataState.from_dict({"position": 1})


def test_the_hash_of_a_plan_covers_all_that_decides_rows() -> None:
    plans = [
        _order({"en": 900, "pl": 400}, BLOCK),
        _order({"en": 900, "pl": 400}, BLOCK, seed=4),
        _order({"en": 901, "pl": 400}, BLOCK),
        _order({"en": 900, "de": 400}, BLOCK),
        _order({"en": 900, "pl": 400}, BLOCK, [1, 1]),
        GlobalOrder(
            [OrderSource("en", 900), OrderSource("pl", 400)], [Phase(BLOCK, (1 << 31, 1 << 31))], 3, 2 * SEQ, 99
        ),
    ]
    assert len({plan.plan_hash(1) for plan in plans}) == len(plans)


def test_the_future_of_a_mixture_may_change_and_its_past_may_not() -> None:
    sources = [OrderSource("en", 100_000), OrderSource("pl", 100_000)]
    one, two, three = (integer_weights(shares) for shares in ([1, 1], [3, 1], [1, 9]))
    old = GlobalOrder(sources, [Phase(BLOCK * SEQ, one), Phase(BLOCK * SEQ, two)], 0, SEQ)
    new = GlobalOrder(sources, [Phase(BLOCK * SEQ, one), Phase(BLOCK * SEQ, three)], 0, SEQ)
    longer = GlobalOrder(sources, [Phase(BLOCK * SEQ, one), Phase(9 * BLOCK * SEQ, two)], 0, SEQ)
    DataState.at(old, ["d"], BLOCK, 0).check(new, ["d"])
    DataState.at(old, ["d"], BLOCK + 1, 0).check(longer, ["d"])
    with pytest.raises(DataError, match="plan_hash"):
        DataState.at(old, ["d"], BLOCK + 1, 0).check(new, ["d"])


def test_the_order_of_a_mixture_never_changes() -> None:
    """Stored digests of two phases over large, small and tiny sources and several epochs; asked piece by piece."""
    sources = [OrderSource("en", 3_000_017), OrderSource("pl", 65_537), OrderSource("de", 9000), OrderSource("und", 70)]
    phases = [
        Phase(2_000_000 * SEQ, integer_weights([8, 4, 1, 0.01])),
        Phase(500_000 * SEQ, integer_weights([1, 1, 0, 0])),
    ]
    order = GlobalOrder(sources, phases, 99, SEQ, max_epochs=1000)
    for first, count, wanted in (
        (0, 30_000, "687b843a555f26547dc953b178b3a278"),
        (1_990_000, 30_000, "e354a814669018798bf8e18274dfe68b"),
        (123_456_789_012, 9000, "8bffde03cc28173f2c342e136fe3fff8"),
    ):
        digest = hashlib.sha256()
        for start in range(first, first + count, 1000):
            source, row = order.rows(np.arange(start, start + 1000))
            digest.update(np.stack([source, row]).astype("<i8").tobytes())
        assert digest.hexdigest()[:32] == wanted
