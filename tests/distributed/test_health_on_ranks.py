"""Skipped steps, a return to an earlier state, and copies that differ, on several ranks."""

from __future__ import annotations

import health_scenarios
import pytest
from training_run import SHARED_BY_TWO, TinyRun, build_shards

pytestmark = pytest.mark.distributed

TOPOLOGIES = [
    {"zero": 0, "expert_parallel": 1},
    {"zero": 1, "expert_parallel": 1},
    {"zero": 3, "expert_parallel": 2},
]
SPLIT = [{"zero": 0, "expert_parallel": 2}, {"zero": 1, "expert_parallel": 2}]


@pytest.mark.slow
def test_a_second_look_finds_the_layer_and_changes_nothing(ranks):
    """The NaN is in the gradient of one layer on the last rank."""
    looked = ranks.run(health_scenarios.look_again, 2, topologies=TOPOLOGIES)
    for topology, first, last in zip(TOPOLOGIES, *looked, strict=True):
        assert first["applied"] is last["applied"] is False
        assert first["found"] is None
        if topology["zero"] == 3:
            # There only the forward pass is looked at.
            assert last["found"] is None
        else:
            layer, backward, micro = last["found"]
            assert layer.startswith("decoder.layers.")
            assert backward
            assert micro == 0
        assert first["nothing"]
        assert last["nothing"]
    records = [first["record"] for first in looked[0]]
    for record in records[1:]:
        for one, other in zip(records[0], record, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_what_blew_up_is_named_and_an_engine_takes_an_earlier_state(ranks):
    for of_rank in ranks.run(health_scenarios.blow_up, 2, topologies=TOPOLOGIES):
        for result in of_rank:
            assert result["skipped"] >= 2
            assert all(result["layers"])
            assert result["loaded"]
            assert result["equal"]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_a_flipped_bit_names_the_rank(ranks, world):
    """Of two copies nobody can say which is right."""
    for of_rank in ranks.run(health_scenarios.flip_a_bit, world, topologies=[*TOPOLOGIES, *SPLIT], victim=1):
        for topology, found in zip([*TOPOLOGIES, *SPLIT], of_rank, strict=True):
            assert found["before"] == found["after"] == []
            assert found["dense"] == ([0, 1] if world == 2 else [1])
            if topology["zero"] < 3:
                # Ranks 1 and 3 hold the same experts where two ranks share a set.
                split = [] if world == 2 else [1, 3]
                assert found["expert"] == (split if topology["expert_parallel"] == 2 else found["dense"]), topology


@pytest.mark.slow
@pytest.mark.parametrize(("zero", "expert_parallel"), [(1, 1), (3, 2)])
def test_a_rate_that_is_too_high_ends_with_advice_and_a_lower_one_goes_on(ranks, tmp_path, zero, expert_parallel):
    """Nothing is committed, and under ZeRO-3 nothing crashes."""
    tiny = TinyRun(tmp_path, build_shards(tmp_path), steps=6)
    topology = [f"parallel={{engine: deepspeed, zero: {zero}, expert_parallel: {expert_parallel}}}"]
    options = [*topology, SHARED_BY_TWO, "train.max_skipped_steps=3", "checkpoint.every_tokens=512"]
    ended = ranks.run(health_scenarios.train_a_run, 2, file=str(tiny.file), overrides=[*options, "optimizer.lr=1e6"])
    assert len(set(ended)) == 1
    assert "3 updates in a row were not finite up to step 4" in ended[0]
    assert not list((tiny.directory / "checkpoints").glob("step-????????"))
    assert [skip["layer"] is not None for skip in tiny.events("skip")] == [True] * 3
    ended = ranks.run(health_scenarios.train_a_run, 2, file=str(tiny.file), overrides=options)
    assert ended == ["DONE", "DONE"]
    assert len(tiny.curve()) == 6
