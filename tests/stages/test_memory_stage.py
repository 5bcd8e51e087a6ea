"""Pre-training of memory attention: shares and labels, dialogues that are strangers to each other, turns that end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import DIALOGUES, dialogue_batch, make_stage, model_config, relative, run_config
from torch import Tensor

from rxt_dist.data.dialogue_source import TurnBatch
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import Work
from rxt_dist.stages.dialogue import write_turn
from rxt_dist.stages.memory import MemoryStage, mixed_label, rms

CPU = torch.device("cpu")


def stage_of(**changes: Any) -> MemoryStage:
    stage = make_stage(run_config(stage="memory", **changes))
    assert isinstance(stage, MemoryStage)
    initialise(stage.model, 0)
    return stage


def sums(stage: MemoryStage, batch: TurnBatch, trained: int | None = 0) -> Tensor:
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    return stage(stage.prepare(batch, trained), load).sums_J


def alone(batch: TurnBatch, row: int) -> TurnBatch:
    """One dialogue with no more turns and no more padding than it needs."""
    lengths = batch.lengths_BU[row]
    turns, width = int((lengths > 0).sum()), int(lengths.max())
    part = slice(row, row + 1)
    return replace(
        batch,
        tokens_BUT=batch.tokens_BUT[part, :turns, :width],
        lengths_BU=batch.lengths_BU[part, :turns],
        samples_B=batch.samples_B[part],
        recalls_BU3=batch.recalls_BU3[part, :turns],
    )


@pytest.mark.parametrize("trained", [0, None])
@pytest.mark.parametrize("scale", ["unit", "raw"])
@pytest.mark.slow
def test_a_dialogue_does_not_depend_on_its_neighbours(scale: str, trained: int | None) -> None:
    """Neither on how many turns they have nor on how long these are, with noise and without."""
    stage, batch = stage_of(label_scale=scale), dialogue_batch()
    whole = sums(stage, batch, trained)
    each = [sums(stage, alone(batch, row), trained) for row in range(len(DIALOGUES))]
    assert relative(torch.stack(each).sum(0), whole) < 1e-5
    # Also where nobody of a micro-batch has the later turns of its batch.
    parts = [sums(stage, part, trained) for part in batch.micro_batches(1)]
    assert relative(torch.stack(parts).sum(0), whole) < 1e-5
    turns = sum(map(len, DIALOGUES))
    micro = stage.prepare(batch, trained)
    assert stage.counts(micro).tolist() == [turns] * len(stage.terms)
    first = stage.views(micro)["turn-1"]
    third = stage.views(micro)["turn-3"]
    assert stage.counts(first)[0] == len(DIALOGUES)
    assert stage.counts(third)[0] == sum(len(dialogue) > 2 for dialogue in DIALOGUES)


def test_what_a_turn_that_is_not_there_says_changes_nothing() -> None:
    stage, batch = stage_of(), dialogue_batch()
    tokens_BUT = batch.tokens_BUT.masked_fill(batch.tokens_BUT == 0, 77)
    assert torch.equal(sums(stage, replace(batch, tokens_BUT=tokens_BUT)), sums(stage, batch))


def test_turns_that_are_not_there_are_not_computed() -> None:
    """But for one row a turn, since other ranks may have some: all parts take part in every step."""
    stage = stage_of()
    rows: list[int] = []
    assert stage.model.encoder is not None
    stage.model.encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    for row, expected in ((None, [8, 6, 3]), (1, [1, 1, 1])):
        batch = dialogue_batch() if row is None else dialogue_batch().micro_batches(1)[row]
        rows.clear()
        sums(stage, batch)
        assert rows == expected


def test_views_of_single_turns_add_up_to_all() -> None:
    stage = stage_of()
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    views = stage.views(stage.prepare(dialogue_batch(), None))
    assert list(views) == ["all", "turn-1", "turn-2", "turn-3"]
    found = {name: stage(view, load).sums_J for name, view in views.items()}
    torch.testing.assert_close(found["turn-1"] + found["turn-2"] + found["turn-3"], found["all"])


def test_shares_fall_with_the_turn_and_move_in_training_only() -> None:
    stage = stage_of()
    samples = torch.arange(2000)
    still = stage._shares(samples, 12, False)
    assert still[0].tolist() == pytest.approx([0.9, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05, 0.05, 0.05])
    moved = stage._shares(samples, 12, True)
    assert torch.equal(moved, stage._shares(samples, 12, True))
    assert moved.min() >= 0.05
    assert moved.max() <= 0.95
    off = moved[:, 2] - still[:, 2]
    assert off.abs().max() <= 0.15
    assert off.abs().max() > 0.14
    assert off.mean() == pytest.approx(0, abs=0.01)
    assert not torch.equal(moved[:, 1] - still[:, 1], off)
    assert torch.equal(stage._shares(samples[7:8], 12, True), moved[7:8])


def test_slots_take_tokens_of_the_turn_in_order_and_never_padding() -> None:
    micro = stage_of().prepare(dialogue_batch(), 0)
    slots = micro.slots_BUS.shape[2]
    assert sorted(micro.samples) == list(range(len(DIALOGUES)))
    for row, sample in enumerate(micro.samples):
        for turn, length in enumerate(DIALOGUES[sample]):
            assert micro.slots_BUS[row, turn].tolist() == [slot * length // slots for slot in range(slots)]


def test_a_label_is_a_share_of_each_where_both_have_one_scale() -> None:
    torch.manual_seed(0)
    old, encoded = torch.randn(2, 3, 4, 8), 50 * torch.randn(2, 3, 5, 8)
    slots, shares = torch.tensor([[0, 1, 2, 4]] * 3), torch.tensor([0.9, 0.5, 0.05])
    raw = mixed_label(old, encoded, slots, shares, None, unit=False)
    unit = mixed_label(old, encoded, slots, shares, None, unit=True)
    taken = encoded[:, :, [0, 1, 2, 4]]
    for row, share in enumerate(shares.tolist()):
        torch.testing.assert_close(raw[:, row], (1 - share) * old[:, row] + share * taken[:, row])
        both = (1 - share) * old[:, row] / rms(old[:, row]) + share * taken[:, row] / rms(taken[:, row])
        torch.testing.assert_close(unit[:, row], both)
    noise = torch.randn_like(raw)
    torch.testing.assert_close(mixed_label(old, encoded, slots, shares, noise, unit=False), raw + noise * rms(raw))


def test_no_gradient_flows_from_a_turn_to_the_one_before() -> None:
    """The gradient of both turns is that of each by itself, given the other's memory as a number."""
    stage = stage_of(input_noise=0.0, label_noise=0.0)
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    batch = alone(dialogue_batch(), 4)
    micro = stage.views(stage.prepare(batch, None))["turn-2"]
    stage(micro, load).sums_J[0].backward()
    model: Any = stage.model
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    stage.zero_grad()
    memory = stage._drawn("fresh", int(batch.samples_B[0]), CPU).unsqueeze(1)
    positions = torch.arange(batch.tokens_BUT.shape[2])[None]
    for turn in range(2):
        encoded = model.encoder(model.embedding(batch.tokens_BUT[:, turn]), positions, keys_BT=micro.keys_BUT[:, turn])
        new, _ = write_turn(model, memory, encoded, micro.keys_BUT[:, turn])
        label = mixed_label(memory, encoded, micro.slots_BUS[:, turn], micro.shares_BU[:, turn], None, unit=True)
        if turn == 1:
            (-torch.cosine_similarity(new, label, dim=-1).mean()).backward()
        memory = new.detach()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-8)


def test_noise_is_a_share_of_what_it_disturbs_and_off_in_evaluation() -> None:
    batch = dialogue_batch()
    quiet, noisy = stage_of(input_noise=0.0, label_noise=0.0), stage_of()
    assert torch.equal(sums(quiet, batch, None), sums(noisy, batch, None))
    assert not torch.equal(sums(quiet, batch), sums(noisy, batch))
    micro = noisy.prepare(batch, 0)
    encoded = 7 * torch.ones(2, 8, 32, 32)
    written, label = noisy._noise(micro, slice(None), 0, encoded)
    live = written[:, micro.keys_BUT[:, 0]]
    assert live.std() == pytest.approx(0.7, rel=0.05)
    assert not written[:, ~micro.keys_BUT[:, 0]].any()
    assert label.std() == pytest.approx(0.05, rel=0.1)


def test_what_is_drawn_depends_on_seed_kind_and_dialogue_alone() -> None:
    stage = stage_of()
    for length in (None, 9):
        drawn = stage._drawn("input-0", 3, CPU, length)
        assert torch.equal(drawn, stage._drawn("input-0", 3, CPU, length))
        others = [stage._drawn("input-0", 4, CPU, length), stage._drawn("input-1", 3, CPU, length)]
        others.append(
            MemoryStage(stage.model, stage.run.model_copy(update={"seed": 1}))._drawn("input-0", 3, CPU, length)
        )
        assert not any(torch.equal(drawn, other) for other in others)


def test_the_gate_of_each_layer_is_told_of_the_dialogues_that_live() -> None:
    stage = stage_of(model=model_config("memory_attention.gate={kind: static}"))
    weights = torch.tensor([1.0, -2.0])
    with torch.no_grad():
        for layer, weight in zip(stage.model.memory_attention.layers, weights, strict=True):  # type: ignore[union-attr]
            layer.write_gate.weight.fill_(weight)  # type: ignore[union-attr]
    gates = [[term.name for term in stage.terms].index(name) for name in ("gate-1", "gate-2")]
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    for view in stage.views(stage.prepare(dialogue_batch(), 0)).values():
        means = stage(view, load).sums_J[gates] / stage.counts(view)[gates]
        torch.testing.assert_close(means.float(), weights.sigmoid())
    assert not stage.weights()[gates].any()
    without = stage_of(model=model_config("memory_attention.gate={kind: none}"))
    assert [term.name for term in without.terms] == ["memory", "change", "rms"]
    assert sums(without, dialogue_batch()).shape == (3,)


def test_the_change_counts_where_it_is_asked_for_and_more_with_the_turn() -> None:
    assert stage_of().weights()[:3].tolist() == [1, 0, 0]
    stage = stage_of(change_weight=0.5)
    assert stage.weights()[:3].tolist() == [1, 0.5, 0]


@pytest.mark.slow
def test_memory_attention_learns_its_label() -> None:
    stage = stage_of()
    engine = PlainEngine(stage, stage.run, CPU)
    losses = []
    for number in range(40):
        result = engine.train_step([stage.prepare(dialogue_batch(number % 4), number)], {"all": 1e-2})
        losses.append(result.totals.sums_J[0] / result.totals.counts_J[0])
    assert torch.stack(losses[-4:]).mean() < torch.stack(losses[:4]).mean() - 0.07


def test_operations_are_those_of_the_frozen_encoder_and_of_the_writes() -> None:
    config = run_config(stage="memory")
    nothing_written = MemoryStage.flops(config, Work(1000, 20_000, {"memory": 0}))
    written = MemoryStage.flops(config, Work(1000, 20_000, {"memory": 50}))
    assert written > nothing_written
    assert MemoryStage.expected_work(config, 6400, 64).counts == {"memory": 100}
