"""The checksum of a training state: the same however the state is cut, another one wherever a number has moved."""

from __future__ import annotations

from typing import Any

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
