"""The plan of a run: memory, traffic and time, against sums done by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rxt_dist.config.load import load_run
from rxt_dist.plan import memory_per_gpu, plan_run, run_parameters, traffic_per_step

RUNS = Path(__file__).parents[1] / "configs/run"
BETA = RUNS / "rxt-beta-zero1.yaml"
DENSE, ROUTED = 221_317_120, 2_717_908_992


def test_trained_parameters_share_the_embedding_and_leave_out_the_memory_attention() -> None:
    built = run_parameters(load_run(BETA))
    assert (built.dense, built.routed) == (DENSE, ROUTED)
    assert (built.frozen_dense, built.frozen_routed) == (0, 0)
    assert DENSE + ROUTED == 2_841_937_920 + 96_958_976 + 33_883_648 - 65_536 * 512


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2, 4, 12), (1, 2, 4, 12 / 64), (2, 2, 4 / 64, 12 / 64), (3, 2 / 64, 4 / 64, 12 / 64)],
)
def test_memory_of_each_stage(stage: int, weights: float, gradients: float, optimizer: float) -> None:
    memory = memory_per_gpu(load_run(BETA), stage, 8192)
    total = DENSE + ROUTED
    assert memory["weights"] == pytest.approx(total * weights)
    assert memory["gradients"] == pytest.approx(total * gradients)
    assert memory["optimizer"] == pytest.approx(total * optimizer)
    parts = ("weights", "gradients", "optimizer", "activations_estimate", "gathered_estimate")
    parts += ("reduced_estimate", "process_estimate")
    assert memory["total_estimate"] == sum(memory[part] for part in parts)


def test_expert_parallelism_divides_experts_over_fewer_copies() -> None:
    memory = memory_per_gpu(load_run(BETA, ["parallel.expert_parallel=8"]), 1, 8192)
    assert memory["weights"] == pytest.approx(2 * (DENSE + ROUTED / 8))
    assert memory["optimizer"] == pytest.approx(12 * (DENSE / 64 + ROUTED / 8 / 8), abs=1)


def test_recomputation_stores_less() -> None:
    kept = memory_per_gpu(load_run(BETA, ["train.recompute=false"]), 1, 8192)
    assert kept["activations_estimate"] > 3 * memory_per_gpu(load_run(BETA), 1, 8192)["activations_estimate"]


def test_traffic() -> None:
    sent = traffic_per_step(load_run(BETA), 1, 8192)
    assert sent["gradients"] == pytest.approx((DENSE + ROUTED) * 4 * 63 / 64)
    assert sent["weights"] == pytest.approx((DENSE + ROUTED) * 2 * 63 / 64)
    assert sent["expert_all_to_all"] == 0
    split = ["parallel.expert_parallel=8", "train.recompute=false", "train.micro_batch_rows=1"]
    sent = traffic_per_step(load_run(BETA, split), 3, 8192)
    # 65,536 tokens of a GPU, 24 layers, 10 copies of 512 numbers of 2 bytes, four crossings, 7 of 8 leave.
    assert sent["expert_all_to_all"] == 65_536 * 24 * 10 * 512 * 2 * 4 * 7 // 8
    # Eight micro-batches gather the weights forward and backward.
    assert sent["weights"] == pytest.approx((DENSE * 63 / 64 + ROUTED / 8 * 7 / 8) * 2 * 16)


def test_time_follows_from_operations_and_utilisation() -> None:
    plan = plan_run(load_run(BETA))
    time = plan["time"]
    assert time["step_seconds_estimate"] == pytest.approx(time["flops_per_step"] / (64 * 312e12 * 0.25))
    assert time["days_estimate"] == pytest.approx(400e9 / time["tokens_per_second_estimate"] / 86400)
    assert plan["batch"] == {
        "seq_len": 8192,
        "global_rows": 512,
        "ranks": 64,
        "micro_batches_per_step": 2,
        "steps": 95_367,
    }


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


def test_float32_weights_are_their_own_masters() -> None:
    memory = memory_per_gpu(load_run(BETA, ["train.precision=float32"]), 0, 8192)
    states = [memory[part] / (DENSE + ROUTED) for part in ("weights", "gradients", "optimizer")]
    assert states == pytest.approx([4, 4, 8])


def test_what_a_rank_takes_beside_its_share() -> None:
    """Two layers gathered where there is something to gather, and one layer's gradients with a float32 copy."""
    layer = 384 * (512 + 3 * 512 * 192) + 512 + 2 * (3 * 512 * 192) + 2 * 512 + 512
    memory = memory_per_gpu(load_run(BETA), 3, 8192)
    assert memory["gathered_estimate"] == pytest.approx(2 * 2 * layer, rel=0.01)
    assert memory["reduced_estimate"] == pytest.approx((2 + 4) * layer, rel=0.01)
    assert memory["process_estimate"] == 400_000_000
    alone = ["cluster.nodes=1", "cluster.gpus_per_node=1", "parallel.expert_parallel=1"]
    assert memory_per_gpu(load_run(BETA, alone), 3, 8192)["gathered_estimate"] == 0


def test_the_interval_of_saves_follows_from_costs_and_failures(tmp_path: Path) -> None:
    """Estimated; and measured, once the run has saved."""
    changes = [f"output={tmp_path}", "cluster={nodes: 8, gpus_per_node: 8, hours_between_failures: 96}"]
    config = load_run(BETA, changes)
    plan = plan_run(config)["checkpoint"]
    built = run_parameters(config)
    trained, frozen = built.dense + built.routed, built.frozen_dense + built.frozen_routed
    assert plan["bytes"] == 12 * trained + 4 * frozen
    assert (plan["cost"], plan["hours_between_failures"]) == ("estimate", 12)
    assert plan["stall_seconds"] == pytest.approx(12 * trained / 64 / 10e9)
    config.directory.mkdir(parents=True)
    (config.directory / "events.jsonl").write_text('{"kind": "save", "stall_s": 2.0, "seconds": 90.0}\n')
    plan = plan_run(config)["checkpoint"]
    assert (plan["cost"], plan["stall_seconds"], plan["written_seconds"]) == ("measured", 2.0, 90.0)
    assert plan["best_interval_seconds"] == pytest.approx((2 * 2 * 12 * 3600) ** 0.5, rel=0.01)
    assert plan["lost_share_at_best"] < 0.02
