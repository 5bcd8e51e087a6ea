"""A rank makes only the weights that it keeps, and takes no more memory than was planned."""

from __future__ import annotations

from typing import Any

import memory_scenarios
import pytest
import torch
from harness import Ranks

pytestmark = pytest.mark.distributed

TOPOLOGIES = (
    {"zero": 3, "expert_parallel": 1},
    {"zero": 3, "expert_parallel": 2, "layers": 2},
    {"zero": 3, "expert_parallel": 2, "precision": "bfloat16"},
    {"zero": 3, "expert_parallel": 2, "stage": "frozen-experts"},
    {"zero": 3, "expert_parallel": 1, "stage": "encoder"},
    {"zero": 1, "expert_parallel": 2},
    {"zero": 0, "expert_parallel": 2},
)
# Large ones: glibc gives blocks from 32 MB on back to the system, and smaller ones stay with the process.
EXPERTS = 16


@pytest.fixture(scope="module")
def begun(ranks: Ranks) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ranks.run(memory_scenarios.first_weights, 2, topologies=list(TOPOLOGIES))[0]
    return found


@pytest.mark.parametrize("index", range(len(TOPOLOGIES)), ids=lambda index: str(TOPOLOGIES[index]))
def test_weights_that_ranks_make_in_pieces_are_those_of_the_seed(index: int, begun: list[dict[str, Any]]) -> None:
    found, wanted = begun[index]["pieces"], begun[index]["wanted"]
    for key, value in found["first"].items():
        kind, name = key.split(":")
        assert torch.equal(value, wanted[name].flatten() if kind == "weight" else torch.zeros_like(value)), key
    rounded = torch.bfloat16 if TOPOLOGIES[index].get("precision") == "bfloat16" else torch.float32
    for name, value in found["frozen"].items():
        assert torch.equal(value.flatten(), wanted[name].flatten().to(rounded)), name
    for name, start, share in found["shares"]:
        assert torch.equal(share, wanted[name].flatten()[start : start + share.numel()]), name
    named = {key.split(":")[1] for key in found["first"]} | {name for name, _, _ in found["shares"]}
    assert named == set(wanted)


@pytest.mark.parametrize("index", range(len(TOPOLOGIES)), ids=lambda index: str(TOPOLOGIES[index]))
def test_a_run_from_pieces_trains_as_one_from_the_whole_model(index: int, begun: list[dict[str, Any]]) -> None:
    pieces, whole = begun[index]["pieces"]["trained"], begun[index]["whole"]["trained"]
    assert pieces.keys() == whole.keys()
    if "precision" in TOPOLOGIES[index]:  # From the whole model the masters begin rounded.
        return
    for key, value in whole.items():
        assert torch.equal(pieces[key], value), key


def test_gradients_are_averaged_in_portions(ranks: Ranks) -> None:
    """Of three ranks: parts of unequal length, empty ones, gradients that share a portion, one that takes several."""
    shapes, elements = [[10], [1], [2, 3, 5], [4, 1], [2]], 12
    of_ranks = ranks.run(memory_scenarios.averages, 3, shapes=shapes, elements=elements)
    for rank, found in enumerate(of_ranks):
        wanted = [sum(gradients) / 3 for gradients in zip(*found["every"], strict=True)]
        for part, mean in zip(found["parts"], wanted, strict=True):
            length = -(-mean.numel() // 3)
            assert torch.allclose(part, mean.flatten()[rank * length : (rank + 1) * length], atol=1e-6)
        assert found["in place"]
        # 4 + 1 + 10 + 2 + 1 numbers of each rank, four at a time.
        assert found["sent"] == [4] * 12 + [2] * 3


def test_small_weights_are_gathered_once_whatever_the_order_of_passes(ranks: Ranks) -> None:
    """And torch looks up no signature of what ZeRO-3 calls around modules; no call is marked for a profiler."""
    for found in ranks.run(memory_scenarios.gathered, 2, steps=3):
        first, *others = found["gathered"]
        assert 0 < first <= found["kept"]
        assert others == [0, 0]
        assert not [name for name in found["asked"] if "_register_deepspeed_module" in name]
        assert found["marked"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "expert_parallel", "count"), [(3, 1, 1), (1, 1, 2), (3, 1, 2), (3, 2, 2)])
def test_memory_of_a_rank_is_as_planned(zero: int, expert_parallel: int, count: int, ranks: Ranks) -> None:
    """86M parameters, 344 MB in float32: the peak of the steps within a tenth of the plan, set-up below it.

    In one run of ten the C library leaves more gaps between its blocks (up to 1.15): one of three runs must keep to it.
    """
    topology = {"engine": "deepspeed", "zero": zero, "expert_parallel": expert_parallel}
    # A gigabyte: with the two engines that hold their state differently.
    saved = (expert_parallel, count) == (1, 2)
    # With experts spread 1.07 to 1.105 (docs/scale.md).
    most = 1.12 if expert_parallel > 1 else 1.1
    for _ in range(3):
        of_ranks = ranks.run(memory_scenarios.memory, count, topology=topology, experts=EXPERTS, saved=saved)
        if all(found["steps"] <= most * found["planned"] for found in of_ranks):
            break
    for found in of_ranks:
        assert 0.9 * found["planned"] <= found["steps"] <= most * found["planned"], found
        assert found["set-up"] <= found["steps"], found
        assert found["program"] < 0.46e9, "0.30 GB with the CPU build of torch, 0.43 with CUDA's"
        assert found["copied masters"] == 0
        assert found["gathered ahead"] == []
        if saved:  # Four threads write, each a block at a time.
            assert found["save"] <= found["largest"] + (48 << 20), found
