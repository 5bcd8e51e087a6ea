"""The checksum of a training state: the same however the state is cut, another one wherever a number has moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rxt_dist.checkpoint import writing
from rxt_dist.checkpoint.writing import Share, wrapped
from rxt_dist.engine.interface import Fragment


def checksum(*fragments: Fragment) -> int:
    return Share(0, fragments, {}).checksum()


def values(seed: int = 0, count: int = 10) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def whole(weight: Tensor, name: str = "a", **moments: Tensor) -> Fragment:
    return Fragment(name, 0, {"weight": weight, **moments})


def test_it_does_not_depend_on_how_a_state_is_cut() -> None:
    weight = values()
    parts = [Fragment("a", start, {"weight": weight[start : start + 3]}) for start in (0, 3, 6, 9)]
    assert checksum(*parts) == checksum(whole(weight))
    assert checksum(*reversed(parts)) == checksum(whole(weight))


def test_the_parts_of_ranks_add_up() -> None:
    """The sum of their parts is the whole's, also where it passes the largest number."""
    weight = values(count=300)
    parts = [checksum(Fragment("a", start, {"weight": weight[start : start + 100]})) for start in (0, 100, 200)]
    assert wrapped(sum(parts)) == checksum(whole(weight))
    assert wrapped(2**63) == -(2**63)
    assert wrapped(-(2**63) - 1) == 2**63 - 1


def test_pieces_of_a_large_tensor_add_up(monkeypatch: Any) -> None:
    expected = checksum(whole(values()))
    monkeypatch.setattr(writing, "_CHECKSUM_ELEMENTS", 4)
    assert checksum(whole(values())) == expected


@pytest.mark.parametrize("count", [0, 1, 5, 11, 12, 13, 24, 100])
@pytest.mark.parametrize("start", [0, 3, 2**40])
def test_a_host_finds_what_a_device_does(count: int, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of three rows of four, rows and elements left over."""
    monkeypatch.setattr(writing, "_CHECKSUM_ELEMENTS", 12)
    monkeypatch.setattr(writing, "_CHECKSUM_COLUMNS", 4)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(count)).to(torch.int32)
    expected = wrapped(sum(value * (2 * (start + place) + 1) for place, value in enumerate(bits.tolist())))
    assert wrapped(writing._host_sum(bits, start)) == wrapped(writing._device_sum(bits, start)) == expected


def test_sums_beyond_the_largest_number_wrap_around_on_a_host() -> None:
    bits = torch.full((1 << 18,), 2**31 - 1, dtype=torch.int32)
    assert wrapped(writing._host_sum(bits, 2**40)) == wrapped(writing._device_sum(bits, 2**40))


def test_whatever_went_to_the_wrong_place_changes_it() -> None:
    weight, moment = values(), values(1)
    sound = checksum(whole(weight, exp_avg=moment), whole(moment, "b"))
    swapped = weight.clone()
    swapped[[2, 5]] = swapped[[5, 2]]
    flipped = weight.clone()
    flipped.view(torch.int32)[4] ^= 1
    wrong = {
        "two elements of a parameter": (whole(swapped, exp_avg=moment), whole(moment, "b")),
        "one bit": (whole(flipped, exp_avg=moment), whole(moment, "b")),
        "weight and moment": (whole(moment, exp_avg=weight), whole(moment, "b")),
        "two parameters": (whole(weight, "b", exp_avg=moment), whole(moment)),
        "all by one place": (Fragment("a", 1, {"weight": weight, "exp_avg": moment}), whole(moment, "b")),
        "a parameter that is missing": (whole(weight, exp_avg=moment),),
    }
    sums = {name: checksum(*fragments) for name, fragments in wrong.items()}
    assert sound not in sums.values()
    assert len(set(sums.values())) == len(sums)
