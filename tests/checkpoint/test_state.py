"""The checksum of a training state: the same however the state is cut, another one wherever a number has moved."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rxt_dist.checkpoint import state
from rxt_dist.checkpoint.checksum import wrapped
from rxt_dist.checkpoint.runs import Run
from rxt_dist.checkpoint.state import _in_streams, _without
from rxt_dist.checkpoint.writing import Share
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


def test_what_others_hold_is_left_out_and_all_else_is_there() -> None:
    weight = torch.arange(20.0)
    runs = [Run("weight", "a", 10, weight[10:]), Run("weight", "a", 0, weight[:10]), Run("weight", "b", 0, weight)]
    held = [Run("weight", "a", first, weight[first:end]) for first, end in ((12, 14), (3, 5), (14, 15), (8, 11))]
    left = list(_without(runs, [*held, Run("exp_avg", "b", 0, weight)]))
    assert [(run.name, run.start, len(run.values)) for run in left] == [
        ("a", 11, 1), ("a", 15, 5), ("a", 0, 3), ("a", 5, 3), ("b", 0, 20),
    ]  # fmt: skip
    assert all(run.values.tolist() == weight[run.start : run.start + len(run.values)].tolist() for run in left)
    assert list(_without(runs, runs)) == []


@pytest.mark.parametrize("threads", [1, 3, 100])
def test_streams_give_every_block_once_and_in_its_order(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "_BLOCK_ELEMENTS", 4)
    monkeypatch.setattr(state, "_THREADS", threads)
    monkeypatch.setattr(state, "processors", lambda: 200)
    runs = [Run("weight", "a", 5, torch.arange(5.0, 15.0)), Run("exp_avg", "a", 0, torch.arange(4.0))]
    seen = _in_streams(lambda run: (run.kind, run.start, run.values.tolist()), runs)
    assert seen == [
        ("weight", 5, [5, 6, 7, 8]),
        ("weight", 9, [9, 10, 11, 12]),
        ("weight", 13, [13, 14]),
        ("exp_avg", 0, [0, 1, 2, 3]),
    ]
    assert _in_streams(str, []) == []
