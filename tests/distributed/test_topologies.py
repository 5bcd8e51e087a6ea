"""The law of topology invariance: ranks, experts' spread, ZeRO stage, accumulation and recomputation change nothing.

Every topology trains two steps of the tiny model on the same packed, padded, noised and masked batches and is
compared with one process of plain torch: losses, gradient norms, expert counts, weights and both moments.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import scenarios
import torch
from harness import Ranks
from tiny import packed_batch, relative

pytestmark = pytest.mark.distributed

TOLERANCE = 1e-5
# Weights and moments have gone through several times that error.
STATE_TOLERANCE = 2e-5
# bfloat16 rounds at 2^-9, and sums over ranks and micro-batches in another order.
BF16_TOLERANCE = 2e-2

# After a bad step there must be some more.
STEPS, STEPS_AROUND_A_BAD_ONE = 2, 4

VALID, TOP_K, MOE_LAYERS = packed_batch().real_tokens, 2, 2


def topology(ranks: int, zero: int, ep: int, accumulation: int, recompute: bool, **changes: Any) -> dict[str, Any]:
    made = {"zero": zero, "expert_parallel": ep, "accumulation": accumulation, "recompute": recompute}
    steps = STEPS_AROUND_A_BAD_ONE if "poison" in changes else STEPS
    return {"ranks": ranks, **made, "steps": steps, **changes}


# With those of VARIED, every ZeRO stage meets every number of ranks, every expert-parallel size, and both values of the
# rest. ZeRO-3 takes four times as long as the others, and four ranks share two cores.
FLOAT32 = [
    topology(1, 0, 1, 2, True),
    topology(1, 1, 1, 4, False),
    topology(1, 2, 1, 1, True),
    topology(1, 3, 1, 2, False),
    topology(2, 0, 2, 1, False),
    topology(2, 1, 1, 1, True),
    topology(2, 2, 2, 2, True),
    topology(4, 0, 1, 1, False),
    topology(4, 1, 1, 2, False),
    topology(4, 1, 2, 1, True),
    topology(4, 3, 4, 1, False),
]
VARIANTS: dict[str, dict[str, Any]] = {
    "bias": {"balancing": "bias", "bias_rate": 0.02},
    "one_place": {"balancing": "bias", "one_place": True},
    "clip": {"clip": 1e-3},
    # All of torch.compile but its kernels, whose making would take minutes.
    "compiled": {"backend": "aot_eager"},
    "local": {"local_biases": True},
    # ZeRO-3 keeps parameters of less than 100,000 elements whole, and the tiny model has no other ones.
    "divided": {"divided": True},
    "bfloat16": {"precision": "bfloat16"},
}
VARIED = [
    topology(2, 3, 2, 1, True, variant="bias"),
    topology(2, 1, 2, 2, False, variant="bias"),
    topology(4, 0, 4, 1, False, variant="bias"),
    topology(2, 3, 2, 1, False, variant="one_place"),
    topology(4, 0, 4, 1, True, variant="one_place"),
    topology(4, 2, 2, 1, True, variant="one_place"),
    topology(2, 0, 2, 1, False, variant="clip"),
    topology(4, 2, 4, 1, False, variant="clip"),
    topology(2, 3, 2, 1, False, variant="clip"),
    topology(2, 3, 2, 1, True, variant="compiled"),
    topology(2, 3, 1, 2, True, variant="divided"),
    topology(4, 3, 2, 1, False, variant="divided"),
    topology(4, 0, 2, 2, True, variant="local"),
    topology(4, 1, 4, 2, False, variant="local"),
    topology(4, 3, 2, 2, True, variant="local"),
]
BF16 = [
    topology(2, 0, 1, 1, False, variant="bfloat16"),
    topology(4, 0, 2, 2, True, variant="bfloat16"),
    topology(2, 1, 2, 2, False, variant="bfloat16"),
    topology(2, 3, 2, 2, True, variant="bfloat16"),
]
POISONED = [
    topology(2, 0, 2, 1, False, poison=(1, 1)),
    topology(4, 1, 4, 1, False, poison=(1, 3)),
    topology(2, 2, 2, 1, False, poison=(1, 0)),
    topology(2, 3, 2, 1, False, poison=(1, 1)),
    topology(2, 1, 2, 1, False, poison=(1, 1), variant="bfloat16"),
    topology(2, 2, 1, 2, False, poison=(1, 0), variant="bfloat16"),
    topology(2, 3, 1, 1, False, poison=(1, 1), variant="bfloat16"),
]
ALL = FLOAT32 + VARIED + BF16 + POISONED


def name_of(wanted: dict[str, Any]) -> str:
    return "-".join(f"{key}{value}" for key, value in wanted.items()).replace("expert_parallel", "ep")


def request_of(wanted: dict[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in wanted.items() if key not in ("ranks", "variant")}
    return own | VARIANTS.get(wanted.get("variant", ""), {})


class Results:
    """All topologies of one number of ranks run in one launch, when the first of them is asked for."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    @cache  # noqa: B019  (one object a session)
    def _launch(self, ranks: int) -> dict[str, Any]:
        wanted = [each for each in ALL if each["ranks"] == ranks]
        requests = [request_of(each) for each in wanted]
        results = self._ranks.run(scenarios.train, ranks, topologies=requests, deadline=240)[0]
        return dict(zip(map(name_of, wanted), results, strict=True))

    @cache  # noqa: B019
    def _plain(self) -> dict[str, Any]:
        wanted = list(dict.fromkeys(map(self._alike, [*ALL, {}])))
        plain = {"engine": "plain", "zero": 0, "backend": None, "steps": STEPS}
        requests = [VARIANTS.get(name, {}) | plain for name in wanted]
        return dict(zip(wanted, self._ranks.run(scenarios.train, 1, topologies=requests)[0], strict=True))

    def of(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return self._launch(wanted["ranks"])[name_of(wanted)]

    def oracle(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return self._plain()[self._alike(wanted)]

    @staticmethod
    def _alike(wanted: dict[str, Any]) -> str:
        """What topologies share that are compared with one training; some variants change none."""
        variant = str(wanted.get("variant", ""))
        return "" if variant in ("compiled", "divided") else variant


@pytest.fixture(scope="session")
def results(ranks: Ranks) -> Results:
    return Results(ranks)


@pytest.mark.parametrize("wanted", FLOAT32 + VARIED, ids=name_of)
def test_a_topology_changes_nothing(wanted: dict[str, Any], results: Results) -> None:
    actual, expected = results.of(wanted), results.oracle(wanted)
    for step, (mine, plain) in enumerate(zip(actual["steps"], expected["steps"], strict=True)):
        assert mine["applied"], f"step {step}: {mine['reason']}"
        assert mine["losses"].tolist() == pytest.approx(plain["losses"].tolist(), rel=TOLERANCE), f"step {step}"
        assert mine["grad_norm"] == pytest.approx(plain["grad_norm"], rel=TOLERANCE), f"step {step}"
        for exact in ("counts", "hits", "experts"):
            assert torch.equal(mine[exact], plain[exact]), f"step {step}: {exact}"
    assert actual["evaluated"].tolist() == pytest.approx(expected["evaluated"].tolist(), rel=TOLERANCE)
    assert actual["agreed"], "ranks disagree about the results"
    for kind in ("expert_counts", "expert_bias"):
        assert (kind in actual["routing"]) == (kind in expected["routing"])
        if kind in expected["routing"]:
            assert torch.equal(actual["routing"][kind], expected["routing"][kind])
    assert actual["state"].keys() == expected["state"].keys()
    off = {name: relative(actual["state"][name], tensor) for name, tensor in expected["state"].items()}
    worst = max(off, key=off.__getitem__)
    assert off[worst] <= STATE_TOLERANCE, f"{worst} is off by {off[worst]:.1e}"


@pytest.mark.parametrize("wanted", ALL, ids=name_of)
def test_fragments_cover_the_whole_state(wanted: dict[str, Any], results: Results) -> None:
    assert results.of(wanted)["fragments"] == []


@pytest.mark.parametrize("wanted", FLOAT32 + BF16, ids=name_of)
def test_every_valid_token_is_counted_once(wanted: dict[str, Any], results: Results) -> None:
    for step in results.of(wanted)["steps"]:
        assert step["experts"].sum(-1).tolist() == [VALID * TOP_K] * MOE_LAYERS
        assert step["counts"].tolist()[2:] == [VALID, VALID]


@pytest.mark.parametrize("wanted", BF16, ids=name_of)
def test_bfloat16_topologies_agree_within_its_precision(wanted: dict[str, Any], results: Results) -> None:
    actual, expected = results.of(wanted), results.oracle(wanted)
    for mine, plain in zip(actual["steps"], expected["steps"], strict=True):
        assert mine["losses"].tolist() == pytest.approx(plain["losses"].tolist(), rel=BF16_TOLERANCE)
        assert mine["grad_norm"] == pytest.approx(plain["grad_norm"], rel=5 * BF16_TOLERANCE)


def test_tokens_that_all_go_to_one_place_are_sent_there(results: Results) -> None:
    for wanted in VARIED:
        if wanted["variant"] == "one_place":
            for step in results.of(wanted)["steps"]:
                assert step["experts"].tolist() == [[0] * 6 + [VALID] * 2] * MOE_LAYERS


def test_a_tiny_clip_binds(results: Results) -> None:
    """The moments must show it: Adam's weights alone do not depend on the scale of gradients."""
    clipped, free = results.oracle({"variant": "clip"}), results.oracle({})
    assert clipped["steps"][0]["grad_norm"] == pytest.approx(free["steps"][0]["grad_norm"])
    name = "exp_avg:embedding.weight"
    assert clipped["state"][name].norm() < 0.01 * free["state"][name].norm()


@pytest.mark.parametrize("wanted", POISONED, ids=name_of)
def test_one_rank_with_a_bad_gradient_stops_the_update_of_all(wanted: dict[str, Any], results: Results) -> None:
    actual, expected = results.of(wanted), results.oracle(wanted)
    steps = actual["steps"]
    assert [step["applied"] for step in steps] == [True, False, True, True]
    assert steps[1]["unchanged"]
    assert "non-finite" in steps[1]["reason"]
    assert actual["agreed"], "ranks disagree about what was applied"
    tolerance = BF16_TOLERANCE if wanted.get("variant") == "bfloat16" else TOLERANCE
    for mine, plain in zip(steps[:2], expected["steps"], strict=True):
        assert mine["losses"].tolist() == pytest.approx(plain["losses"].tolist(), rel=tolerance)
    assert all(torch.isfinite(tensor).all() for tensor in actual["state"].values())
    assert all(bool(torch.isfinite(step["losses"]).all()) for step in steps)


def test_training_goes_on_after_a_skipped_step_as_if_it_had_not_been(results: Results) -> None:
    """The same skipped step on all ZeRO stages leads to the same losses afterwards."""
    after = [results.of(wanted)["steps"][-1]["losses"].tolist() for wanted in POISONED if "variant" not in wanted]
    for losses in after[1:]:
        assert losses == pytest.approx(after[0], rel=TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
def test_our_routed_block_computes_what_autoep_computes(ranks: Ranks, bias: bool) -> None:
    for differences in ranks.run(scenarios.routed_block, 2, expert_parallel=2, bias=bias):
        assert max(differences.values()) <= TOLERANCE, differences
