"""What limits a step under which topology, against sums done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rxt_dist.config.load import load_run
from rxt_dist.limits import Limits, Spread, limits, plan_topologies, step_traffic, verdict
from rxt_dist.plan import plan_run

BETA = Path(__file__).parents[1] / "configs/run/rxt-beta.yaml"
DENSE, ROUTED = 221_317_120, 2_717_908_992
# Bytes of the visited copies that a GPU's 65,536 tokens of a step send through 24 layers, 10 experts each, six times.
VISITS = 65_536 * 24 * 10 * 6 * 512 * 2


def sent(*overrides: str, zero: int) -> tuple[float, float]:
    return step_traffic(load_run(BETA, overrides), zero, 8192)


def test_without_expert_parallelism_all_is_spread_over_all_gpus() -> None:
    """Eight nodes of eight: seven eighths of every buffer pass the links of a GPU, and seven eighths leave a node."""
    gpu, node = sent("parallel.expert_parallel=1", zero=1)
    assert gpu == node == pytest.approx((DENSE + ROUTED) * (4 + 2) * 7 / 8)


def test_experts_of_a_node_send_tokens_inside_it_and_weights_between_nodes() -> None:
    """Two micro-batches: two reductions of 4 bytes, four gathers of 2."""
    gpu, node = sent(zero=3)
    assert gpu == pytest.approx(DENSE * 16 * 7 / 8 + VISITS * 7 / 8)
    # Each of the eight GPUs of a node exchanges its own eighth of the experts with seven other nodes.
    assert node == pytest.approx(DENSE * 16 * 7 / 8 + 8 * (ROUTED / 8 * 16 * 7 / 8))


def test_groups_smaller_than_a_node_have_two_copies_of_an_expert_in_it() -> None:
    gpu, node = sent("parallel.expert_parallel=4", zero=1)
    assert gpu == pytest.approx(DENSE * 6 * 7 / 8 + ROUTED / 4 * 6 / 2 + VISITS * 3 / 4)
    assert node == pytest.approx(DENSE * 6 * 7 / 8 + 4 * (ROUTED / 4 * 6 * 7 / 8))


def test_groups_larger_than_a_node_send_tokens_over_the_network() -> None:
    gpu, node = sent("parallel.expert_parallel=16", zero=1)
    assert gpu == pytest.approx(DENSE * 6 * 7 / 8 + VISITS * 7 / 16)
    # Of an expert there are four copies, on every second node.
    assert node == pytest.approx(DENSE * 6 * 7 / 8 + 8 * (ROUTED / 16 * 6 * 3 / 4) + 8 * VISITS / 2)


def test_a_group_across_the_border_of_a_node_counts_as_one_on_two_nodes() -> None:
    assert Spread.of([range(4), range(4, 8), range(8, 12)], 6) == Spread(2, 2)
    assert Spread.of([range(1)], 8) == Spread(1, 1)


def test_times_are_bytes_over_the_speeds_of_the_cluster() -> None:
    config = load_run(BETA, ["cluster.gpu_link_gb_s=100", "cluster.node_link_gb_s=2"])
    found = limits(config, 1.5, 8192)
    assert found.gpu_links_s == pytest.approx(found.gpu_link_bytes / 100e9)
    assert found.network_s == pytest.approx(found.network_bytes / 2e9)
    assert found.lower_bound_s == found.network_s > 1.5
    assert found.limited_by == "network between nodes"
    assert found.without_overlap_s == pytest.approx(1.5 + found.gpu_links_s + found.network_s)


def test_the_topologies_of_a_run_are_its_own_and_all_others_once() -> None:
    config = load_run(BETA)
    plan = plan_run(config)
    found = plan_topologies(config, plan)
    own = found["own_estimate"]
    assert (own["zero"], own["expert_parallel"]) == (3, 8)
    assert own["memory_bytes"] == plan["memory_per_gpu_bytes"]["zero_3"]["total_estimate"]
    assert own["arithmetic_s"] == plan["time"]["step_seconds_estimate"]
    others = [(other["zero"], other["expert_parallel"]) for other in found["others_estimate"]]
    assert others == [(1, 1), (1, 8), (2, 1), (2, 8), (3, 1)]


def topology(zero: int, expert_parallel: int, links: float, network: float, **changes: Any) -> Limits:
    times = {"arithmetic": 1.0, "links inside nodes": links, "network between nodes": network}
    longest = max(times, key=times.__getitem__)
    made = {
        "zero": zero,
        "expert_parallel": expert_parallel,
        "memory_bytes": 20 * 10**9 // (zero + 1),
        "fits": True,
        "gpu_link_bytes": 0,
        "network_bytes": 0,
        "arithmetic_s": 1.0,
        "gpu_links_s": links,
        "network_s": network,
        "lower_bound_s": times[longest],
        "without_overlap_s": sum(times.values()),
        "limited_by": longest,
    }
    return Limits(**(made | changes))


@pytest.mark.parametrize(
    ("own", "other", "said"),
    [
        (topology(1, 1, 0.1, 0.1), topology(3, 8, 0.4, 0.1), "No other of these should be faster than ZeRO 1"),
        # Two hundredths of a second are less than an estimate can tell.
        (topology(3, 1, 0.1, 0.12), topology(1, 1, 0.1, 0.1), "No other of these should be faster"),
        (
            topology(3, 8, 0.4, 0.1),
            topology(1, 1, 0.1, 0.1),
            "both are limited by arithmetic, but the first has less traffic to hide, 0.1 s on the links inside nodes "
            "in place of 0.4. ZeRO 3, EP 8 takes 2.0 times less memory.",
        ),
        (
            topology(1, 1, 0.1, 3.0),
            topology(3, 8, 2.0, 0.1),
            "ZeRO 3, EP 8 should be faster than ZeRO 1, EP 1: 2 s on the links inside nodes in place of 0.1 and 0.1 s "
            "on the network between nodes in place of 3. The one is limited by links inside nodes, the other by",
        ),
        (topology(0, 1, 0.1, 0.1, fits=False), topology(3, 8, 0.4, 0.1), "ZeRO 0, EP 1 does not fit into the memory"),
        (topology(0, 1, 0, 0, fits=False), topology(3, 8, 0, 0, fits=False), "No topology fits"),
    ],
)
def test_the_verdict(own: Limits, other: Limits, said: str) -> None:
    assert said in verdict(own, [other])
