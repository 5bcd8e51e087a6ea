from __future__ import annotations

import pytest
import torch
from tiny import model_config
from torch import nn

from rxt_dist.engine.expert_parallel import RoutedShape, is_expert, model_name, pieces
from rxt_dist.model.moe import RoutedExperts

WIDTH, HIDDEN = 3, 5
PREFIX = "decoder.layers.7.feed_forward.routed."


def split(experts: int, ranks: int, rank: int, whole: dict[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """What a rank holds of its run of experts: AutoEP's w1 gate, w2 down and w3 up, and our biases."""
    mine = slice(rank * experts // ranks, (rank + 1) * experts // ranks)
    gate, up = whole["gate_up_proj"].chunk(2, dim=1)
    parameters = {}
    biases = ((name, whole[name]) for name in ("gate_up_bias", "down_bias"))
    for name, tensor in (("w1", gate), ("w2", whole["down_proj"]), ("w3", up), *biases):
        parameters[name] = nn.Parameter(tensor[mine].clone())
        parameters[name].allreduce = False
    return parameters


@pytest.mark.parametrize(("experts", "ranks"), [(2, 2), (4, 1), (6, 3), (8, 2), (8, 4), (8, 8), (12, 4)])
def test_pieces_of_all_ranks_put_the_experts_together_again(experts: int, ranks: int) -> None:
    shapes = {
        "gate_up_proj": (experts, 2 * HIDDEN, WIDTH),
        "down_proj": (experts, WIDTH, HIDDEN),
        "gate_up_bias": (experts, 2 * HIDDEN),
        "down_bias": (experts, WIDTH),
    }
    whole = {name: torch.randn(shape) for name, shape in shapes.items()}
    made = {name: torch.full((tensor.numel(),), float("nan")) for name, tensor in whole.items()}
    times = {name: torch.zeros(tensor.numel(), dtype=torch.int64) for name, tensor in whole.items()}
    for rank in range(ranks):
        for name, parameter in split(experts, ranks, rank, whole).items():
            covered = 0
            for piece in pieces(f"{PREFIX}experts.{name}", parameter, rank):
                ours = piece.name.removeprefix(f"{PREFIX}experts.")
                there = slice(piece.start, piece.start + piece.length)
                here = slice(piece.local_start, piece.local_start + piece.length)
                made[ours][there] = parameter.detach().view(-1)[here]
                times[ours][there] += 1
                covered += piece.length
            assert covered == parameter.numel()
    for name, tensor in whole.items():
        assert bool((times[name] == 1).all())
        assert torch.equal(made[name].view_as(tensor), tensor)


@pytest.mark.parametrize("experts", [False, True])
def test_a_partitioned_parameter_is_mapped_by_its_full_shape(experts: bool) -> None:
    """ZeRO-3 leaves an empty tensor behind and keeps the shape beside it."""
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size((4, HIDDEN, WIDTH))
    parameter.allreduce = not experts
    name = f"{PREFIX}experts.w3" if experts else "encoder.layers.0.feed_forward.gate_up_proj.weight"
    found = list(pieces(name, parameter, 0))
    assert sum(piece.length for piece in found) == 4 * HIDDEN * WIDTH
    assert len(found) == (4 if experts else 1)


def test_all_other_parameters_are_one_piece_under_our_name() -> None:
    weight = nn.Parameter(torch.zeros(4, 6))
    (piece,) = pieces(f"{PREFIX}router.gate.weight", weight, 3)
    assert (piece.name, piece.local_start, piece.start, piece.length) == (f"{PREFIX}gate.weight", 0, 0, 24)
    (piece,) = pieces("embedding.weight", weight, 3)
    assert (piece.name, piece.length) == ("embedding.weight", 24)
    assert not is_expert(weight)


def test_names_that_patterns_see_are_those_of_the_model() -> None:
    ours = {name for name, _ in RoutedExperts(model_config()).named_parameters()}
    for theirs in ("router.gate.weight", "experts.w1", "experts.w2", "experts.w3"):
        renamed = model_name(PREFIX + theirs)
        assert renamed.removeprefix(PREFIX) in ours
    assert model_name("lm_head.output.weight") == "lm_head.output.weight"


def test_autoep_reads_the_shape_of_the_model() -> None:
    assert RoutedShape.of(model_config()) == RoutedShape(8, 2, 32, 24)
