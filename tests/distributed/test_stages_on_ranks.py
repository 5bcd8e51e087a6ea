"""Every stage of the registry on several ranks, beside one process of plain torch; and across a checkpoint.

The joint stage has a wider set of topologies in test_topologies.py. A stage without experts cannot split them.
"""

from __future__ import annotations

from typing import Any

import extended  # noqa: F401  (adds the stages that only tests have)
import pytest
import torch
from harness import Ranks
from resume_scenarios import SAVED_AT, load_and_go_on, save_and_go_on
from scenarios import train
from tiny import ROWS, TOKENS, relative, run_config

from rxt_dist.config.cluster import ClusterConfig
from rxt_dist.config.stages import DEFAULT_STAGE, STAGES
from rxt_dist.config.validate import settle_topology

pytestmark = pytest.mark.distributed

TOLERANCE, STATE_TOLERANCE = 1e-5, 2e-5
OTHERS = [kind for kind in STAGES if kind != DEFAULT_STAGE]

# Stages that read other rows and compute as another one does: on ranks they have nothing of their own.
DERIVED = ("sft", "decoder-sft")
# What rounding could change is what is frozen.
PRECISE = [(kind, "float32") for kind in OTHERS] + [(kind, "bfloat16") for kind in ("memory", "frozen-experts")]

# Two groups of parameters then have different rates for the first steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "lm": {"embedding_after": 2 * ROWS * TOKENS + 1},
    "smat": {"memory_after": ROWS * TOKENS, "encoder_after": 3 * ROWS * TOKENS, "recompute_turns": False},
}
# Of a stage that takes long, those that matter to it: dialogues whose numbers of turns differ by rank and step.
CHOSEN: dict[str, list[dict[str, Any]]] = {
    "smat": [
        {"zero": 0, "accumulation": 2},
        {"zero": 1, "expert_parallel": 2},
        {"zero": 3, "accumulation": 2},
        {"zero": 3, "expert_parallel": 2, "recompute_turns": True},
    ]
}


def topologies(kind: str) -> list[dict[str, Any]]:
    """Two ranks: every ZeRO stage, experts split where there are some, accumulation and recomputation."""
    if kind in CHOSEN:
        return CHOSEN[kind]
    config = run_config(stage=kind, expert_parallel=0)
    config = config.model_copy(update={"cluster": ClusterConfig(gpus_per_node=2)})
    splits_experts = settle_topology(config, 2).parallel.expert_parallel == 2
    if kind in DERIVED:
        return [{"zero": 3, "expert_parallel": 2 if splits_experts else 1, "accumulation": 2}]
    found: list[dict[str, Any]] = [
        {"zero": 0, "accumulation": 2},
        {"zero": 1},
        {"zero": 2, "recompute": True},
        {"zero": 3, "accumulation": 2},
    ]
    if splits_experts:
        found += [{"zero": zero, "expert_parallel": 2} for zero in (0, 1, 3)]
        found.append({"zero": 3, "expert_parallel": 2, "reading": True})
    if "decoder" in config.stage.parts():
        found.append({"zero": 3, "reading": True, "accumulation": 2})
    return found


@pytest.mark.parametrize("kind", OTHERS)
def test_a_topology_changes_nothing(kind: str, ranks: Ranks) -> None:
    own = {"stage": kind, **SETTINGS.get(kind, {})}
    expected = ranks.run(train, 1, topologies=[{"engine": "plain", "zero": 0, **own}])[0][0]
    wanted = topologies(kind)
    results = ranks.run(train, 2, topologies=[{**own, **each} for each in wanted])[0]
    for topology, actual in zip(wanted, results, strict=True):
        assert actual["agreed"], topology
        assert actual["fragments"] == [], topology
        for mine, plain in zip(actual["steps"], expected["steps"], strict=True):
            assert mine["applied"], (topology, mine["reason"])
            torch.testing.assert_close(mine["losses"], plain["losses"], rtol=TOLERANCE, atol=0, msg=str(topology))
            assert mine["grad_norm"] == pytest.approx(plain["grad_norm"], rel=TOLERANCE), topology
            for exact in ("counts", "hits", "experts"):
                assert torch.equal(mine[exact], plain[exact]), (topology, exact)
        torch.testing.assert_close(actual["evaluated"], expected["evaluated"], rtol=TOLERANCE, atol=0)
        assert actual["state"].keys() == expected["state"].keys()
        off = {name: relative(actual["state"][name], tensor) for name, tensor in expected["state"].items()}
        assert max(off.values()) <= STATE_TOLERANCE, (topology, max(off, key=off.__getitem__))
        assert all(torch.equal(actual["frozen"][name], tensor) for name, tensor in expected["frozen"].items()), topology


@pytest.mark.parametrize(("kind", "precision"), PRECISE)
def test_a_checkpoint_goes_on_on_the_same_ranks_and_on_others(
    kind: str, precision: str, ranks: Ranks, tmp_path: Any
) -> None:
    """In bfloat16 too what is frozen is saved as it was before it was rounded."""
    writer = {"zero": 3, "stage": kind, "precision": precision}
    steps = SAVED_AT + 3
    expected = ranks.run(save_and_go_on, 2, directory=str(tmp_path), topology=writer, steps=steps)[0]
    same = ranks.run(load_and_go_on, 2, directory=str(tmp_path), topologies=[writer], steps=steps)[0][0]
    assert same["records"] == expected["records"]
    assert same["checksum"] == expected["checksum"]
    for world, others in ((1, [{"engine": "plain", "zero": 0}, {"zero": 3}]), (2, [{"zero": 0}, {"zero": 1}])):
        wanted = [{**other, "stage": kind, "precision": precision} for other in others]
        for result in ranks.run(load_and_go_on, world, directory=str(tmp_path), topologies=wanted, steps=steps)[0]:
            assert result["loaded"] == result["saved"], (world, others)
            if precision == "float32":
                reference = torch.tensor(expected["records"])
                torch.testing.assert_close(torch.tensor(result["records"]), reference, rtol=1e-5, atol=0)
