"""Which settings a run could have, what limits them, and which comes first."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rxt_dist.config.load import load_run
from rxt_dist.config.validate import validate_run
from rxt_dist.errors import ConfigError
from rxt_dist.plan.setting import Setting
from rxt_dist.plan.settings import Estimate, estimate, plan_settings, ranked, valid_settings, verdict

RUNS = Path(__file__).parents[2] / "configs/run"
FLOPS = {"encoder": 60, "lm_head": 30, "mlm_head": 10}


def beta(*overrides: str) -> Setting:
    return Setting.of(load_run(RUNS / "rxt-beta.yaml", overrides))


def test_times_are_bytes_over_the_speeds_of_the_cluster() -> None:
    found = estimate(beta("cluster.gpu_link_gb_s=100", "cluster.node_link_gb_s=2"), 1.5)
    assert found.gpu_links_s == pytest.approx(found.gpu_link_bytes / 100e9)
    assert found.network_s == pytest.approx(found.network_bytes / 2e9)
    assert found.lower_bound_s == found.network_s > 1.5
    assert found.limited_by == "network between nodes"
    assert found.without_overlap_s == pytest.approx(1.5 + found.gpu_links_s + found.network_s)


def test_the_settings_of_a_run_are_its_own_and_all_others_once() -> None:
    """512 rows on 64 ranks: micro-batches of 1, 2, 4 and 8; experts over 1, 2, 4 and 8 GPUs of a node."""
    keys = [each.key for each in valid_settings(beta())]
    assert keys[0] == (3, 8, 4, True)
    assert len(keys) == len(set(keys)) == 4 * 4 * 4 * 2


def test_experts_never_cross_a_node_unless_the_run_says_so() -> None:
    settings = list(valid_settings(beta("cluster={nodes: 16, gpus_per_node: 4}", "parallel.expert_parallel=0")))
    assert max(each.expert_parallel for each in settings[1:]) == 4
    forced = beta("cluster={nodes: 16, gpus_per_node: 4}")
    found = list(valid_settings(forced))
    assert found[0].expert_parallel == 8
    assert max(each.expert_parallel for each in found[1:]) == 4
    assert "split over 8 GPUs, and a node has 4" in plan_settings(forced, 1.0, FLOPS)["verdict"]


@pytest.mark.parametrize("name", ["rxt-beta", "rxt-beta-micro", "rxt-alpha-nano", "demo"])
def test_every_setting_is_one_that_training_takes(name: str) -> None:
    ramp = [
        "train.micro_batch_rows=2",
        "train.ramp={start_tokens: 1048576, increment_tokens: 1048576, over_tokens: 1e10}",
    ]
    config = load_run(RUNS / f"{name}.yaml", ramp if name == "rxt-beta" else [])
    own = Setting.of(config.model_copy(update={"parallel": config.parallel.model_copy(update={"expert_parallel": 1})}))
    for each in valid_settings(own):
        validate_run(each.config, config.cluster.ranks, None)
    with pytest.raises(ConfigError):
        validate_run(own.with_(micro_rows=7).config, config.cluster.ranks, None)


def test_one_process_has_its_micro_batch_and_recomputation_to_choose() -> None:
    plain = ["parallel={engine: plain, zero: 0}", "cluster={nodes: 1, gpus_per_node: 1}"]
    own = Setting.of(load_run(RUNS / "demo.yaml", plain))
    assert {each.key[:2] for each in valid_settings(own)} == {(0, 1)}


def test_rows_of_unknown_length_leave_the_micro_batch_as_it_is() -> None:
    assert {each.micro_rows for each in valid_settings(beta("data.seq_len=null"))} == {4}


def test_recomputation_repeats_the_forward_pass_of_the_layers() -> None:
    """Of 100 operations 60 are in layers, a third of them in the forward pass."""
    own = beta()
    found = plan_settings(own, 1.2, FLOPS)
    assert found["own_estimate"]["arithmetic_s"] == pytest.approx(1.2)
    both = [*found["ranked_estimate"], *found["refused_estimate"]]
    assert {round(each["arithmetic_s"], 6) for each in both} == {1.0, 1.2}
    assert {each["arithmetic_s"] > 1.1 for each in both if each["recompute"]} == {True}


def test_what_does_not_fit_is_refused_with_the_reason() -> None:
    found = plan_settings(beta(), 1.0, FLOPS)
    assert len(found["ranked_estimate"]) + len(found["refused_estimate"]) == 128
    (worst,) = [
        each
        for each in found["refused_estimate"]
        if (each["zero"], each["expert_parallel"], each["micro_rows"], each["recompute"]) == (0, 1, 8, False)
    ]
    assert "GB where 72 of 80 can be used" in worst["refused"]
    assert "of it activations and 35.3 of it optimizer" in worst["refused"]
    assert all(each["memory_bytes"] <= 72e9 for each in found["ranked_estimate"])
    nowhere = plan_settings(beta("cluster={nodes: 8, gpus_per_node: 8, gpu_memory_gb: 0.5}"), 1.0, FLOPS)
    assert nowhere["ranked_estimate"] == []
    assert nowhere["own_rank"] is None
    assert "No setting fits" in nowhere["verdict"]


def made(zero: int, expert_parallel: int, links: float, network: float, **changes: Any) -> Estimate:
    times = {"arithmetic": 1.0, "links inside nodes": links, "network between nodes": network}
    longest = max(times, key=times.__getitem__)
    fields = {
        "zero": zero,
        "expert_parallel": expert_parallel,
        "micro_rows": 4,
        "recompute": False,
        "accumulation": 2,
        "memory_bytes": 20 * 10**9 // (zero + 1),
        "refused": "",
        "gpu_link_bytes": 0,
        "network_bytes": 0,
        "arithmetic_s": 1.0,
        "gpu_links_s": links,
        "network_s": network,
        "lower_bound_s": times[longest],
        "without_overlap_s": sum(times.values()),
        "limited_by": longest,
    }
    return Estimate(**(fields | changes))


def test_the_order_of_settings() -> None:
    quick, hidden, slow = made(1, 1, 0.1, 0.1), made(3, 8, 0.4, 0.1), made(1, 8, 0.1, 3.0)
    # Within five percent of the lowest bound there is less to hide.
    near = made(2, 1, 0.1, 0.0, arithmetic_s=1.03, lower_bound_s=1.03, without_overlap_s=1.13)
    fewer = replace(quick, accumulation=1, micro_rows=8)
    assert ranked([slow, hidden, quick, near, fewer]) == [near, fewer, quick, hidden, slow]
    assert ranked([]) == []


@pytest.mark.parametrize(
    ("own", "others", "said"),
    [
        (made(1, 1, 0.1, 0.1), [made(3, 8, 0.4, 0.1)], "No other setting should be faster than ZeRO 1"),
        # Two hundredths of a second are less than an estimate can tell.
        (made(3, 1, 0.1, 0.12), [made(1, 1, 0.1, 0.1)], "No other setting should be faster"),
        (
            made(3, 8, 0.4, 0.1),
            [made(1, 1, 0.1, 0.1)],
            "both are limited by arithmetic, but the first has less to do, 0.1 s on the links inside nodes in place of "
            "0.4. ZeRO 3, EP 8, 4 rows, kept takes 2.0 times less memory.",
        ),
        (
            made(1, 1, 0.1, 3.0),
            [made(3, 8, 2.0, 0.1)],
            "ZeRO 3, EP 8, 4 rows, kept should be faster than ZeRO 1, EP 1, 4 rows, kept: 2 s on the links inside "
            "nodes in place of 0.1 and 0.1 s on the network between nodes in place of 3. The one is limited by links "
            "inside nodes, the other by network",
        ),
        (made(0, 1, 0.1, 0.1, refused="takes 90 GB"), [made(3, 8, 0.4, 0.1)], "kept takes 90 GB; of the settings that"),
        (made(0, 1, 0, 0, refused="takes 90 GB"), [], "No setting fits"),
    ],
)
def test_the_verdict(own: Estimate, others: list[Estimate], said: str) -> None:
    fitting = [each for each in (own, *others) if not each.refused]
    assert said in verdict(own, ranked(fitting))
