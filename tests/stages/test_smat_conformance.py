"""Memory-aware training against the reference's numbers: three turns, forward 1e-5, and gradients 1e-4 of the whole
loss, with the memory detached at each turn and never."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from answering import CONFIG, reference_network, vectors
from model.conformance import part_of
from tiny import relative, run_config
from torch import Tensor

from rxt_dist.data.dialogue_source import TurnBatch
from rxt_dist.losses import StageOutput
from rxt_dist.model.reference_names import to_ours
from rxt_dist.stages.smat import SmatBatch, SmatStage

TURNS = 3
# Terms of a term's name.
AR, FIRST_TURN = 0, 6


class GivenMemory(SmatStage):
    """The stage with the memory that the reference began with, and with what its decoder read."""

    def first_memory(self, micro: SmatBatch, device: torch.device) -> Tensor:
        self.read: list[Tensor] = []
        return vectors("smat")["stm0"][:, list(micro.samples)]

    def _decoded(self, memory_LRSD: Tensor, *arguments: Any) -> Any:
        self.read.append(memory_LRSD.detach())
        return super()._decoded(memory_LRSD, *arguments)


@cache
def batch() -> TurnBatch:
    stored = vectors("smat")
    tokens_BUT = torch.stack([stored[f"step{turn}.ids"] for turn in range(TURNS)], dim=1)
    lengths_BU = torch.stack([stored[f"step{turn}.mask"].sum(1) for turn in range(TURNS)], dim=1)
    return TurnBatch(tokens_BUT, lengths_BU, torch.arange(3), torch.zeros(3, TURNS, 3, dtype=torch.int64))


def computed(**changes: Any) -> tuple[SmatStage, SmatBatch, StageOutput]:
    run = run_config(stage="smat", model=CONFIG, turns=TURNS, **changes)
    network = reference_network()
    stage = GivenMemory(network, run)
    network.zero_grad()
    micro = stage.prepare(batch(), 0)
    return stage, micro, stage(micro, torch.full((CONFIG.moe_layers, 5), 0.2))


@pytest.mark.parametrize("train_mode", [False, True])
@pytest.mark.parametrize("recompute", [True, False])
def test_what_each_turn_reads_and_loses_is_the_references(recompute: bool, train_mode: bool) -> None:
    stored = vectors("smat")
    stage, micro, output = computed(recompute_turns=recompute, train_mode=train_mode)
    targets = "targets" if train_mode else "targets_without_mode"
    loss = "loss" if train_mode else "loss_without_mode"
    counts = stage.counts(micro)
    assert isinstance(stage, GivenMemory)
    read = torch.cat(stage.read, dim=1).split(3, dim=1)
    for turn in range(TURNS):
        wanted = stored[f"step{turn}.{targets}"]
        assert counts[FIRST_TURN + turn] == (wanted != -100).sum()
        mean = output.sums_J[FIRST_TURN + turn] / counts[FIRST_TURN + turn]
        assert relative(mean, stored[f"step{turn}.{loss}"]) < 1e-5
        assert relative(read[turn], stored[f"step{turn}.stm"]) < 1e-5
        first_hits = stored[f"step{turn}.logits"][:, :-1].argmax(-1) == wanted
        assert output.hits_J[FIRST_TURN + turn] == first_hits.sum()


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("name", "depth"), [("depth1", 1), ("full", None), ("full", 3)])
@pytest.mark.slow
def test_gradients_through_the_memory_are_the_references(name: str, depth: int | None, recompute: bool) -> None:
    stored = vectors("smat")
    stage, micro, output = computed(depth=depth, recompute_turns=recompute)
    assert stage.counts(micro)[AR] == stored[f"{name}.count"]
    loss = output.sums_J[AR] / stage.counts(micro)[AR].float()
    assert relative(loss, stored[f"{name}.loss"]) < 1e-5
    loss.backward()
    wanted: dict[str, Tensor] = {}
    for part in ("encoder", "decoder", "memory_attention"):
        wanted |= to_ours(CONFIG, part, part_of(stored, f"{name}.grad.{part}."))
    found = {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys() == dict(stage.model.named_parameters()).keys()
    norm = torch.stack([gradient.norm() for gradient in found.values()]).norm()
    assert relative(norm, stored[f"{name}.grad_norm"]) < 1e-4
    for parameter, gradient in wanted.items():
        assert relative(found[parameter], gradient) < 1e-4, parameter
