"""Every stage of the registry on several ranks, beside one process of plain torch; and across a checkpoint.

The joint stage has a wider set of topologies in test_topologies.py. A stage without experts cannot split them.
"""

from __future__ import annotations

from typing import Any

import extended  # noqa: F401  (adds the stages that only tests have)
import pytest
import torch
import update_scenarios
from harness import Ranks
from resume_scenarios import SAVED_AT, load_and_go_on, save_and_go_on
from scenarios import train
from tiny import ROWS, TOKENS, relative, run_config

from rxt_dist.config.cluster import ClusterConfig
from rxt_dist.config.stages import DEFAULT_STAGE, STAGES
from rxt_dist.config.validate import settle_topology

pytestmark = pytest.mark.distributed

TOLERANCE, STATE_TOLERANCE = 1e-5, 2e-5
# Gradients through several turns begin with more rounding, and Adam makes whole steps of the smallest, of biases at 0.
TURNS_TOLERANCE = 1e-4
OTHERS = [kind for kind in STAGES if kind != DEFAULT_STAGE]

# Stages that read other rows and compute as another one does: on ranks they have nothing of their own.
DERIVED = ("sft", "decoder-sft")
# What rounding could change is what is frozen.
PRECISE = [(kind, "float32") for kind in OTHERS if kind not in DERIVED]
PRECISE += [(kind, "bfloat16") for kind in ("memory", "frozen-experts")]

# Two groups of parameters then have different rates for the first steps.
SETTINGS: dict[str, dict[str, Any]] = {
    "lm": {"embedding_after": ROWS * TOKENS + 1},
    # Two layers, each of whose memories reads that of the other.
    "smat": {"layers": 2, "memory_after": ROWS * TOKENS, "encoder_after": 2 * ROWS * TOKENS, "recompute_turns": False},
}


def steps_of(kind: str) -> int:
    """The last one is the first at which all parts of a stage of SETTINGS are trained; of others all are at once."""
    return 3 if kind in SETTINGS else 2


def topologies(kind: str) -> list[dict[str, Any]]:
    """Two ranks: every ZeRO stage, experts split where there are some, accumulation and recomputation.

    ZeRO-3 takes four times as long as the others; as it is without more, it is what writes the checkpoints below.
    """
    config = run_config(stage=kind, expert_parallel=0)
    config = config.model_copy(update={"cluster": ClusterConfig(gpus_per_node=2)})
    experts = settle_topology(config, 2).parallel.expert_parallel
    recomputed = {"recompute_turns": True} if kind == "smat" else {"recompute": True}
    whole: dict[str, Any] = {"zero": 3, "expert_parallel": experts}
    if kind != "smat":  # Its turns are passes already.
        whole["accumulation"] = 2
    if kind in DERIVED:
        return [whole]
    return [
        {"zero": 0, "expert_parallel": experts, "accumulation": 2},
        {"zero": 1, "expert_parallel": experts},
        {"zero": 2, **recomputed},
        whole | recomputed | {"reading": "decoder" in config.stage.parts()},
    ]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_topology_changes_nothing(kind: str, ranks: Ranks) -> None:
    own = {"stage": kind, "steps": steps_of(kind), **SETTINGS.get(kind, {})}
    expected = ranks.run(train, 1, topologies=[{"engine": "plain", "zero": 0, **own}])[0][0]
    wanted = topologies(kind)
    results = ranks.run(train, 2, topologies=[own | each for each in wanted])[0]
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
        allowed = TURNS_TOLERANCE if kind == "smat" else STATE_TOLERANCE
        assert max(off.values()) <= allowed, (topology, max(off, key=off.__getitem__))
        assert all(torch.equal(actual["frozen"][name], tensor) for name, tensor in expected["frozen"].items()), topology


@pytest.mark.parametrize(
    "topology",
    [{"zero": 3, "expert_parallel": 2}, {"zero": 3, "expert_parallel": 1}, {"zero": 1, "expert_parallel": 2}],
)
def test_a_stage_looks_at_its_model_and_makes_several_updates(topology: dict[str, Any], ranks: Ranks) -> None:
    """What it sees is what the first of its updates then has for a loss, and the second one follows from the first."""
    plain = {"engine": "plain", "zero": 0}
    wanted = ranks.run(update_scenarios.look_and_update, 1, topology=plain, steps=2)[0]
    found = ranks.run(update_scenarios.look_and_update, 2, topology=topology, steps=2)[0]
    for result in (wanted, found):
        torch.testing.assert_close(result["seen"], result["updates"][::2, 0], rtol=TOLERANCE, atol=0)
        assert (result["updates"][::2, 0] > result["updates"][1::2, 0]).all(), "no update was made"
    for what in ("seen", "updates"):
        torch.testing.assert_close(found[what], wanted[what], rtol=TOLERANCE, atol=0)
    off = {name: relative(found["state"][name], tensor) for name, tensor in wanted["state"].items()}
    assert max(off.values()) <= STATE_TOLERANCE, max(off, key=off.__getitem__)


@pytest.mark.parametrize(("kind", "precision"), PRECISE)
def test_a_checkpoint_goes_on_on_the_same_ranks_and_on_others(
    kind: str, precision: str, ranks: Ranks, tmp_path: Any
) -> None:
    """In bfloat16 too what is frozen is saved as it was before it was rounded."""
    own = {"stage": kind, "precision": precision} | ({"recompute_turns": False} if kind == "smat" else {})
    writer, steps = {"zero": 3, **own}, SAVED_AT + 2
    arguments: dict[str, Any] = {"directory": str(tmp_path), "steps": steps}
    expected = ranks.run(save_and_go_on, 2, topology=writer, **arguments)[0]
    of_two = [writer, {"zero": 0, **own}, {"zero": 1, **own}]
    same, *others = ranks.run(load_and_go_on, 2, topologies=of_two, **arguments)[0]
    assert same["records"] == expected["records"]
    assert same["checksum"] == expected["checksum"]
    others += ranks.run(load_and_go_on, 1, topologies=[{"engine": "plain", "zero": 0, **own}], **arguments)[0]
    for result in (same, *others):
        assert result["loaded"] == result["saved"]
        if precision == "float32":
            reference = torch.tensor(expected["records"])
            torch.testing.assert_close(torch.tensor(result["records"]), reference, rtol=1e-5, atol=0)
