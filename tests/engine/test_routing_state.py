from __future__ import annotations

import pytest
import torch
from tiny import make_stage, run_config

from rxt_dist.engine.routing import RoutingState, routed_blocks

CPU = torch.device("cpu")
COUNTS = torch.tensor([[10, 20, 30, 40], [25, 25, 25, 25]])


def test_loads_are_uniform_before_the_first_batch() -> None:
    state = RoutingState(2, 4, CPU, None)
    assert state.load_ME.tolist() == [[0.25] * 4] * 2
    assert state.bias_ME is None


def test_loads_are_the_fractions_of_the_last_batch_only() -> None:
    state = RoutingState(2, 4, CPU, None)
    state.update(torch.ones_like(COUNTS))
    state.update(COUNTS)
    assert state.load_ME[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert state.load_ME[1].tolist() == [0.25] * 4
    assert state.load_ME.dtype == torch.float32


def test_a_bias_rises_below_the_mean_load_and_falls_above_it() -> None:
    state = RoutingState(2, 4, CPU, bias_rate=0.01)
    state.update(COUNTS)
    state.update(COUNTS)
    assert state.bias_ME is not None
    assert state.bias_ME[0].tolist() == pytest.approx([0.02, 0.02, -0.02, -0.02])
    assert state.bias_ME[1].tolist() == [0.0] * 4


def test_routed_blocks_see_their_biases_change_in_place() -> None:
    config = run_config(balancing="bias", bias_rate=0.5)
    model = make_stage(config).model
    blocks = routed_blocks(model)
    state = RoutingState.of(model, config.train, CPU)
    counts = torch.zeros(len(blocks), 8, dtype=torch.int64)
    counts[1, 3] = 8
    state.update(counts)
    assert blocks[1].expert_bias.tolist() == [0.5] * 3 + [-0.5] + [0.5] * 4
    state.load({"expert_counts": counts, "expert_bias": torch.full((len(blocks), 8), 0.125)})
    assert blocks[2].expert_bias.tolist() == [0.125] * 8


def test_balancing_by_biases_reaches_an_even_load() -> None:
    """A closed loop: loads follow fixed scores plus biases; the best experts must lose what the others gain."""
    scores_NE = torch.rand(4000, 4, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.5, 0.2, 0.1, 0.0])
    state = RoutingState(1, 4, CPU, bias_rate=0.005)
    assert state.bias_ME is not None
    for _ in range(300):
        chosen = (scores_NE + state.bias_ME[0]).argmax(-1)
        state.update(torch.bincount(chosen, minlength=4).unsqueeze(0))
    assert state.load_ME.max().item() < 1.1 * 0.25


@pytest.mark.parametrize("rate", [None, 0.01])
def test_state_goes_into_a_checkpoint_and_back(rate: float | None) -> None:
    state, other = RoutingState(2, 4, CPU, rate), RoutingState(2, 4, CPU, rate)
    state.update(COUNTS)
    other.load({name: tensor.clone() for name, tensor in state.state().items()})
    assert torch.equal(other.load_ME, state.load_ME)
    assert other.state().keys() == state.state().keys()
    assert all(torch.equal(other.state()[name], tensor) for name, tensor in state.state().items())


def test_a_run_may_go_on_with_the_other_way_of_balancing() -> None:
    plain, biased = RoutingState(2, 4, CPU, None), RoutingState(2, 4, CPU, 0.01)
    biased.update(COUNTS)
    plain.load(biased.state())
    assert torch.equal(plain.load_ME, biased.load_ME)
    fresh = RoutingState(2, 4, CPU, 0.01)
    fresh.load(plain.state())
    assert fresh.bias_ME is not None
    assert not fresh.bias_ME.any()
