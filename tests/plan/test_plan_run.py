"""The plan of a run: batch, operations, time, saves and cost."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rxt_dist.config.load import load_run, resolved_yaml
from rxt_dist.config.run import RunConfig
from rxt_dist.plan.run import plan_run
from rxt_dist.plan.setting import run_parameters

RUNS = Path(__file__).parents[2] / "configs/run"
BETA = RUNS / "rxt-beta-zero1.yaml"
CHANGED = "cluster={nodes: 8, gpus_per_node: 8, hours_between_failures: 96, gpu_hour_price: 3}"


def begun(tmp_path: Path, *events: dict[str, object], mfu: float | None = None) -> RunConfig:
    """A run that has trained on the cluster of its plan."""
    config = load_run(BETA, [f"output={tmp_path}", CHANGED])
    config.directory.mkdir(parents=True)
    (config.directory / "config.resolved.yaml").write_text(resolved_yaml(config))
    (config.directory / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if mfu is not None:
        lines = ({"step": step, "mfu": mfu * (1 + (step - 2) / 100)} for step in (1, 2, 3))
        (config.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return config


def test_time_follows_from_operations_and_utilisation() -> None:
    plan = plan_run(load_run(BETA))
    time = plan["time"]
    assert time["step_seconds_estimate"] == pytest.approx(time["flops_per_step"] / (64 * 312e12 * 0.25))
    assert time["days_estimate"] == pytest.approx(400e9 / time["tokens_per_second_estimate"] / 86400)
    assert time["mfu_source"] == "assumed"
    assert plan["batch"] == {
        "seq_len": 8192,
        "global_rows": 512,
        "ranks": 64,
        "micro_batches_per_step": 2,
        "steps": 95_367,
    }


def test_all_settings_of_64_gpus_are_planned_within_two_seconds() -> None:
    began = time.process_time()
    settings = plan_run(load_run(RUNS / "rxt-beta.yaml", []))["settings"]
    assert time.process_time() - began < 2
    assert len(settings["ranked_estimate"]) + len(settings["refused_estimate"]) == 128


def test_operations_are_told_by_part() -> None:
    plan = plan_run(load_run(BETA))
    parts = plan["flops_per_token"]
    assert sum(parts.values()) == pytest.approx(plan["time"]["flops_per_token"])
    assert parts["lm_head"] == 6 * (512 * 65_536 + 65_536)


def test_cost_is_hours_times_price_with_what_failures_take() -> None:
    plan = plan_run(load_run(BETA))
    lost, hours = plan["checkpoint"]["lost_share_at_own_estimate"], plan["time"]["days_estimate"] * 24 * 64
    assert plan["cost"]["gpu_hours_estimate"] == pytest.approx(hours / (1 - lost))
    assert plan["cost"]["usd_estimate"] == pytest.approx(2 * hours / (1 - lost))
    free = plan_run(load_run(BETA, ["cluster.gpu_hour_price=0"]))
    assert free["cost"]["usd_estimate"] is None


def test_the_utilisation_that_a_run_has_shown_is_taken(tmp_path: Path) -> None:
    config = begun(tmp_path, mfu=0.4)
    time = plan_run(config)["time"]
    assert (time["mfu_source"], time["mfu"]) == ("measured", pytest.approx(0.4))
    assert time["step_seconds_estimate"] == pytest.approx(time["flops_per_step"] / (64 * 312e12 * 0.4))
    elsewhere = load_run(BETA, [f"output={tmp_path}", CHANGED, "cluster.gpus_per_node=4"])
    assert plan_run(elsewhere)["time"]["mfu_source"] == "assumed"


@pytest.mark.parametrize("ramp", ["null", "{start_tokens: 16, increment_tokens: 16, over_tokens: 1600}"])
def test_steps_are_counted_before_anybody_knows_how_long_rows_are(ramp: str) -> None:
    """The model's row is then longer than a batch."""
    unknown = [
        "parallel.expert_parallel=1",
        "data.seq_len=null",
        "train.global_batch_tokens=64",
        "train.total_tokens=6500",
        f"train.ramp={ramp}",
    ]
    steps = plan_run(load_run(RUNS / "demo.yaml", unknown))["batch"]["steps"]
    assert steps == plan_run(load_run(RUNS / "demo.yaml", [*unknown, "data.seq_len=16"]))["batch"]["steps"]
    assert steps == 101 if ramp == "null" else steps > 101


def test_the_interval_of_saves_follows_from_costs_and_failures(tmp_path: Path) -> None:
    """Estimated; and measured, once the run has saved."""
    config = load_run(BETA, [f"output={tmp_path}", CHANGED])
    plan = plan_run(config)["checkpoint"]
    built = run_parameters(config)
    trained, frozen = built.dense + built.routed, built.frozen_dense + built.frozen_routed
    assert plan["bytes"] == 12 * trained + 4 * frozen
    assert (plan["cost"], plan["hours_between_failures"]) == ("estimate", 12)
    assert plan["stall_seconds"] == pytest.approx(12 * trained / 64 / 10e9)
    assert plan["written_seconds"] == pytest.approx(12 * trained / 8 / 1e9)
    plan = plan_run(begun(tmp_path, {"kind": "save", "stall_s": 2.0, "seconds": 90.0}))["checkpoint"]
    assert (plan["cost"], plan["stall_seconds"], plan["written_seconds"]) == ("measured", 2.0, 90.0)
    assert plan["best_interval_seconds"] == pytest.approx((2 * 2 * 12 * 3600) ** 0.5, rel=0.01)
    assert plan["lost_share_at_best"] < 0.02


def test_the_published_training_of_micro_is_of_the_size_that_its_card_states() -> None:
    """Its card: 150 hours on four A100 with 40 GB, with all later stages; here pre-training alone at a stated 25 %."""
    cluster = RUNS.parent / "cluster/a100-40gb-1x4.yaml"
    plan = plan_run(load_run(RUNS / "rxt-beta-micro.yaml", [f"cluster={cluster}"]))
    assert plan["cluster"] == "a100-40gb-1x4"
    assert 1 < plan["cost"]["gpu_hours_estimate"] < 600
