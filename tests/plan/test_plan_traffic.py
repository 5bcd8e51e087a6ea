"""What ranks send each other in a step, against sums done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxt_dist.config.load import load_run
from rxt_dist.plan.setting import Setting
from rxt_dist.plan.traffic import Spread, step_traffic, traffic_per_step

BETA = Path(__file__).parents[2] / "configs/run/rxt-beta.yaml"
DENSE, ROUTED = 221_317_120, 2_717_908_992
# Bytes of the visited copies that a GPU's 65,536 tokens of a step send through 24 layers, 10 experts each, six times.
VISITS = 65_536 * 24 * 10 * 6 * 512 * 2


def beta(*overrides: str, zero: int) -> Setting:
    return Setting.of(load_run(BETA, overrides)).with_(zero=zero)


def test_what_a_gpu_sends() -> None:
    sent = traffic_per_step(beta("parallel.expert_parallel=1", zero=1))
    assert sent["gradients"] == pytest.approx((DENSE + ROUTED) * 4 * 63 / 64)
    assert sent["weights"] == pytest.approx((DENSE + ROUTED) * 2 * 63 / 64)
    assert sent["expert_all_to_all"] == 0
    sent = traffic_per_step(beta("train.recompute=false", "train.micro_batch_rows=1", zero=3))
    # 65,536 tokens of a GPU, 24 layers, 10 copies of 512 numbers of 2 bytes, four crossings, 7 of 8 leave.
    assert sent["expert_all_to_all"] == 65_536 * 24 * 10 * 512 * 2 * 4 * 7 // 8
    # Eight micro-batches gather the weights forward and backward.
    assert sent["weights"] == pytest.approx((DENSE * 63 / 64 + ROUTED / 8 * 7 / 8) * 2 * 16)


def test_without_expert_parallelism_all_is_spread_over_all_gpus() -> None:
    """Eight nodes of eight: seven eighths of every buffer pass the links of a GPU, and seven eighths leave a node."""
    gpu, node = step_traffic(beta("parallel.expert_parallel=1", zero=1))
    assert gpu == node == pytest.approx((DENSE + ROUTED) * (4 + 2) * 7 / 8)


def test_experts_of_a_node_send_tokens_inside_it_and_weights_between_nodes() -> None:
    """Two micro-batches: two reductions of 4 bytes, four gathers of 2."""
    gpu, node = step_traffic(beta(zero=3))
    assert gpu == pytest.approx(DENSE * 16 * 7 / 8 + VISITS * 7 / 8)
    # Each of the eight GPUs of a node exchanges its own eighth of the experts with seven other nodes.
    assert node == pytest.approx(DENSE * 16 * 7 / 8 + 8 * (ROUTED / 8 * 16 * 7 / 8))


def test_groups_smaller_than_a_node_have_two_copies_of_an_expert_in_it() -> None:
    gpu, node = step_traffic(beta("parallel.expert_parallel=4", zero=1))
    assert gpu == pytest.approx(DENSE * 6 * 7 / 8 + ROUTED / 4 * 6 / 2 + VISITS * 3 / 4)
    assert node == pytest.approx(DENSE * 6 * 7 / 8 + 4 * (ROUTED / 4 * 6 * 7 / 8))


def test_groups_larger_than_a_node_send_tokens_over_the_network() -> None:
    gpu, node = step_traffic(beta("parallel.expert_parallel=16", zero=1))
    assert gpu == pytest.approx(DENSE * 6 * 7 / 8 + VISITS * 7 / 16)
    # Of an expert there are four copies, on every second node.
    assert node == pytest.approx(DENSE * 6 * 7 / 8 + 8 * (ROUTED / 16 * 6 * 3 / 4) + 8 * VISITS / 2)


def test_a_group_across_the_border_of_a_node_counts_as_one_on_two_nodes() -> None:
    assert Spread.of([range(4), range(4, 8), range(8, 12)], 6) == Spread(2, 2)
    assert Spread.of([range(1)], 8) == Spread(1, 1)
