"""Which side an item goes to: by its rank alone, but for the one that a small source is given by force."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from data_prep.building.rowstream import HeldOut

_TOP = 2**64 - 1


def _sides(fraction: float, ranks: list[int]) -> dict[str, list[tuple[int, int]]]:
    """(rank, number) of the items on each side, in the order in which they arrived there."""
    held_out: HeldOut[tuple[int, int]] = HeldOut(fraction)
    sides: dict[str, list[tuple[int, int]]] = {"train": [], "eval": []}
    for number, rank in enumerate(ranks):
        for split, item in held_out.add(rank, (rank, number)):
            sides[split].append(item)
    for split, item in held_out.finish():
        sides[split].append(item)
    return sides


@given(
    ranks=st.lists(st.one_of(st.integers(0, 5), st.integers(_TOP - 4, _TOP), st.integers(0, _TOP)), max_size=30),
    fraction=st.sampled_from([0.0, 1e-18, 0.02, 0.5]),
)
def test_equal_items_are_never_on_both_sides_and_none_is_lost(ranks: list[int], fraction: float) -> None:
    sides = _sides(fraction, ranks)
    assert sorted(number for side in sides.values() for _, number in side) == list(range(len(ranks)))
    train, held_out = ({rank for rank, _ in sides[split]} for split in ("train", "eval"))
    assert not train & held_out
    natural = {rank for rank in ranks if rank < int(fraction * 2**64)}
    if natural or not fraction:
        assert held_out == natural
    else:
        # By force the smallest, with its equals, where something else is left to train on.
        assert held_out == ({min(ranks)} if len(set(ranks)) > 1 else set())


def test_the_smallest_waits_with_its_equals() -> None:
    sides = _sides(0.02, [_TOP, _TOP - 2, _TOP - 1, _TOP - 2, _TOP - 2, _TOP])
    assert sides["eval"] == [(_TOP - 2, number) for number in (1, 3, 4)]
    assert sides["train"] == [(_TOP, 0), (_TOP - 1, 2), (_TOP, 5)]
