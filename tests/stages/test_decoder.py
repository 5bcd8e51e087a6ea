"""The decoder alone: a memory that says nothing, parts that stay, and its operations; the encoder alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import ROWS, make_stage, packed_batch, relative, run_config

from rxt_dist.engine.plain import PlainEngine
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import Work, stage_class
from rxt_dist.stages.decoder import DecoderStage, constant_memory
from rxt_dist.stages.mlm import MlmStage

CPU = torch.device("cpu")


def engine_of(**changes: Any) -> PlainEngine:
    stage = make_stage(run_config(**({"stage": "decoder"} | changes)))
    initialise(stage.model, 0)
    return PlainEngine(stage, stage.run, CPU)


def moved(engine: PlainEngine) -> set[str]:
    """Names of the parameters that one step changes, with weight decay on everything that trains."""
    stage: Any = engine.stage
    before = {name: p.detach().clone() for name, p in stage.model.named_parameters()}
    engine.train_step([stage.prepare(packed_batch(), 0)], {"all": 1e-2})
    return {name for name, p in stage.model.named_parameters() if not torch.equal(before[name], p)}


@pytest.mark.parametrize("memory", ["fixed", "off"])
@pytest.mark.parametrize("train_embedding", [False, True])
def test_what_reads_the_memory_and_the_embedding_stay(memory: str, train_embedding: bool) -> None:
    engine = engine_of(memory=memory, train_embedding=train_embedding, weight_decay=0.5)
    names = {name for name, _ in engine.stage.model.named_parameters()}  # type: ignore[union-attr]
    still = names - moved(engine)
    reads = {name for name in names if ".cross_" in name or ".memory_norm." in name}
    assert reads
    assert still == reads | (set() if train_embedding else {"embedding.weight"})


def test_the_fixed_memory_is_small_the_same_in_every_run_and_one_for_all_rows() -> None:
    config = run_config(stage="decoder")
    memory = constant_memory(config, "fixed")
    assert memory.shape == (config.model.layers, 1, config.model.stm_slots, config.model.dim)
    assert memory.std() == pytest.approx(1, abs=0.1)
    assert torch.equal(memory, constant_memory(config.model_copy(update={"seed": 9}), "fixed"))
    assert not torch.equal(memory, constant_memory(config, "fresh"))
    stage = engine_of().stage
    assert isinstance(stage, DecoderStage)
    read = stage._memory("fixed", torch.zeros(1))
    assert read is not None
    assert torch.equal(read, 0.02 * memory)
    assert stage._memory("off", torch.zeros(1)) is None


def test_a_decoder_without_memory_is_one_whose_cross_attention_is_silent() -> None:
    engine = engine_of(memory="off")
    stage: Any = engine.stage
    micro = stage.prepare(packed_batch(), None)
    off = stage(micro, engine.routing.load_ME).sums_J
    fixed = stage(replace(micro, memory="fixed"), engine.routing.load_ME).sums_J
    assert not torch.equal(off, fixed)
    for name, parameter in stage.model.named_parameters():
        if ".cross_attention.out" in name:
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(stage(replace(micro, memory="fixed"), engine.routing.load_ME).sums_J, off)


def test_evaluation_sees_the_fixed_a_fresh_and_no_memory() -> None:
    engine = engine_of()
    stage: Any = engine.stage
    views = stage.views(stage.prepare(packed_batch(), None))
    assert list(views) == ["fixed", "fresh", "off"]
    sums = [stage(view, engine.routing.load_ME).sums_J[0].item() for view in views.values()]
    assert len(set(sums)) == 3
    without = engine_of(memory="off").stage
    assert isinstance(without, DecoderStage)
    assert list(without.views(without.prepare(packed_batch(), None))) == ["off"]


def test_the_loss_of_a_row_does_not_depend_on_its_neighbours() -> None:
    engine = engine_of()
    stage: Any = engine.stage
    whole = stage(stage.prepare(packed_batch(), 0), engine.routing.load_ME).sums_J[0]
    rows = [stage(stage.prepare(part, 0), engine.routing.load_ME).sums_J[0] for part in packed_batch().micro_batches(1)]
    assert relative(sum(rows), whole) < 1e-6
    assert len(rows) == ROWS


def test_operations_count_the_slots_that_are_read_or_nothing_of_the_memory() -> None:
    work = Work(1000, 20_000, {"mlm": 150})
    joint = run_config(stage="joint")
    slots, layers = joint.model.stm_slots, joint.model.layers
    together = stage_class(joint).flops_by_part(joint, work)
    fixed, off = (run_config(stage="decoder", memory=memory) for memory in ("fixed", "off"))
    alone, silent = (DecoderStage.flops_by_part(config, work) for config in (fixed, off))
    for part in ("self_attention", "feed_forward", "lm_head"):
        assert alone[part] == silent[part] == together[part] > 0
    assert alone["encoder"] == silent["cross_attention"] == 0
    # Two query heads of eight; attention costs 12 for each pair and width.
    assert together["cross_attention"] - alone["cross_attention"] == 12 * layers * 16 * (20_000 - 1000 * slots)
    encoder = MlmStage.flops_by_part(run_config(stage="mlm"), work)
    assert encoder["encoder"] == together["encoder"] > 0
    assert encoder["mlm_head"] == together["mlm_head"] > 0
    assert sum(encoder.values()) == encoder["encoder"] + encoder["mlm_head"]


def test_the_encoder_alone_learns_what_it_learns_in_joint_training() -> None:
    """The same masked loss, and the same gradients, as the encoder's part of the joint loss."""
    gradients = []
    for kind, weights in (("mlm", {}), ("joint", {"weights": {"ar": 0.0, "mlm": 1.0, "balance": 0.0, "z": 0.0}})):
        stage = make_stage(run_config(stage=kind, **weights))
        initialise(stage.model, 0)
        engine = PlainEngine(stage, stage.run, CPU)
        micro = stage.prepare(packed_batch(), 0)
        output = stage(micro, engine.routing.load_ME)
        at = [term.name for term in stage.terms].index("mlm")
        output.sums_J[at].backward()
        assert stage.model.encoder is not None
        found = {name: p.grad for name, p in stage.model.encoder.named_parameters()}
        gradients.append((output.sums_J[at].detach(), found))
    assert isinstance(make_stage(run_config(stage="mlm")), MlmStage)
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert all(torch.equal(gradients[0][1][name], grad) for name, grad in gradients[1][1].items())
