"""A checkpoint goes on bit-exactly on the ranks that wrote it, and to 1e-5 on any others."""

from __future__ import annotations

import pytest
import torch
from resume_scenarios import SAVED_AT, load_and_go_on, save_and_go_on

pytestmark = pytest.mark.distributed

WRITER = {"zero": 3, "expert_parallel": 2}
STEPS = SAVED_AT + 4


@pytest.fixture(scope="module")
def uninterrupted(ranks, tmp_path_factory):
    """(folder with a checkpoint of 4 ranks EP 2 ZeRO 3 after SAVED_AT steps, what the run did after it)."""
    directory = str(tmp_path_factory.mktemp("checkpoints"))
    return directory, ranks.run(save_and_go_on, 4, directory=directory, topology=WRITER, steps=STEPS)[0]


def test_more_steps_on_the_same_ranks_are_bit_equal(ranks, uninterrupted):
    directory, expected = uninterrupted
    result = ranks.run(load_and_go_on, 4, directory=directory, topologies=[WRITER], steps=STEPS)[0][0]
    assert result["records"] == expected["records"]
    assert result["checksum"] == expected["checksum"]


@pytest.mark.parametrize(
    ("world", "topologies"),
    [
        (1, [{"engine": "plain", "zero": 0}]),
        (1, [{"zero": 1}, {"zero": 2}, {"zero": 3, "accumulation": 4}]),
        (2, [{"zero": 3, "expert_parallel": 2}, {"zero": 1, "expert_parallel": 2}, {"zero": 0, "accumulation": 2}]),
        (4, [{"zero": 3, "expert_parallel": 4}, {"zero": 2}, {"zero": 0, "expert_parallel": 4, "recompute": True}]),
    ],
)
def test_other_ranks_and_expert_parallelism_go_on_alike(ranks, uninterrupted, world, topologies):
    directory, expected = uninterrupted
    steps = SAVED_AT + 2
    reference = torch.tensor(expected["records"][: steps - SAVED_AT])
    results = ranks.run(load_and_go_on, world, directory=directory, topologies=topologies, steps=steps)[0]
    for topology, result in zip(topologies, results, strict=True):
        assert result["loaded"] == result["saved"], topology
        torch.testing.assert_close(torch.tensor(result["records"]), reference, rtol=1e-5, atol=0, msg=str(topology))


@pytest.mark.parametrize(
    ("writer", "readers"),
    [
        ({"zero": 3, "expert_parallel": 2}, [{"zero": 1}, {"zero": 0}]),
        ({"zero": 2}, [{"zero": 3, "expert_parallel": 2}, {"zero": 0, "expert_parallel": 2}]),
    ],
    ids=str,
)
def test_biases_of_experts_are_split_and_put_together_again(ranks, tmp_path, writer, readers):
    local = {"local_biases": True}
    arguments = {"directory": str(tmp_path), "steps": SAVED_AT + 2}
    expected = torch.tensor(ranks.run(save_and_go_on, 2, topology=writer | local, **arguments)[0]["records"])
    results = ranks.run(load_and_go_on, 2, topologies=[reader | local for reader in readers], **arguments)[0]
    for reader, result in zip(readers, results, strict=True):
        assert result["loaded"] == result["saved"], reader
        torch.testing.assert_close(torch.tensor(result["records"]), expected, rtol=1e-5, atol=0, msg=str(reader))


@pytest.mark.parametrize(
    "topology",
    [{"zero": 0, "expert_parallel": 2}, {"zero": 1}, {"zero": 1, "expert_parallel": 2}, {"zero": 2}, {"zero": 3}],
    ids=str,
)
def test_bfloat16_goes_on_bit_equal(ranks, tmp_path, topology):
    topology = topology | {"precision": "bfloat16"}
    steps = SAVED_AT + 2
    expected = ranks.run(save_and_go_on, 2, directory=str(tmp_path), topology=topology, steps=steps)[0]
    result = ranks.run(load_and_go_on, 2, directory=str(tmp_path), topologies=[topology], steps=steps)[0][0]
    assert result["records"] == expected["records"]
    assert result["checksum"] == expected["checksum"]


def test_every_state_counts_its_own_steps_and_groups_keep_their_names(ranks, uninterrupted):
    directory, _ = uninterrupted
    topologies = [{"zero": 1, "expert_parallel": 2}, {"zero": 3, "expert_parallel": 2}]
    steps = SAVED_AT + 2
    for result in ranks.run(load_and_go_on, 2, directory=directory, topologies=topologies, steps=steps)[0]:
        assert result["own_counters"]
        assert result["counts"] == [float(steps)]
        assert ("ep_size_2", True) in [tuple(group) for group in result["groups"]]
        assert (None, False) in [tuple(group) for group in result["groups"]]


def test_a_shared_step_counter_would_be_noticed(ranks, uninterrupted):
    """The fault of DeepSpeed's universal load, planted: the counter runs ahead and the losses leave the track."""
    directory, expected = uninterrupted
    arguments = {"directory": directory, "topologies": [{"zero": 1}], "steps": STEPS}
    faulty = ranks.run(load_and_go_on, 1, shared_counter=True, **arguments)[0][0]
    assert faulty["counts"] != [float(STEPS)]
    reference = torch.tensor(expected["records"])
    assert not torch.allclose(torch.tensor(faulty["records"]), reference, rtol=1e-5, atol=0)
