"""Memory-aware training: its formula written out dialogue by dialogue, strangers in a batch, what trains when, what is
told of recall."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from stages.test_memory_stage import alone
from tiny import DIALOGUES, ROWS, TOKENS, dialogue_batch, make_stage, model_config, relative, run_config
from torch import Tensor

from rxt_dist.config.stages import SmatConfig
from rxt_dist.data.dialogue_source import TurnBatch
from rxt_dist.data.interactions import ANSWER_ID, INTERNAL_ID, NO_LOSS, QUERY_ID, answer_labels, are_system_prompts
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.losses import StageOutput
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import Work
from rxt_dist.stages.dialogue import write_turn
from rxt_dist.stages.smat import Decoded, SmatStage

CPU = torch.device("cpu")
STEP = ROWS * TOKENS
SYSTEM_QUERY = (91, 92)
KEPT_OR_NOT = pytest.mark.parametrize("recompute", [True, False])


def stage_of(**changes: Any) -> SmatStage:
    stage = make_stage(run_config(stage="smat", **{"turns": 3} | changes))
    assert isinstance(stage, SmatStage)
    initialise(stage.model, 0)
    with torch.no_grad():
        # What a memory says is then heard.
        for name, parameter in stage.model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("embedding"):
                parameter.mul_(3)
    return stage


def load_of(stage: SmatStage) -> Tensor:
    return PlainEngine(stage, stage.run, CPU).routing.load_ME


def output_of(stage: SmatStage, batch: TurnBatch, trained: int | None = 0) -> StageOutput:
    return stage(stage.prepare(batch, trained), load_of(stage))


def term(stage: SmatStage, name: str) -> int:
    return [each.name for each in stage.terms].index(name)


def gradients(stage: SmatStage, output: StageOutput) -> dict[str, Tensor]:
    stage.zero_grad()
    output.sums_J[0].backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in stage.model.named_parameters()}


def system_batch(template: str = "beta") -> TurnBatch:
    """Two dialogues begin with a system prompt, one of which has nothing else."""
    opening = {"beta": [BOS_ID, INTERNAL_ID], "alpha": [BOS_ID, QUERY_ID, *SYSTEM_QUERY, ANSWER_ID]}[template]
    batch = dialogue_batch()
    tokens = batch.tokens_BUT.clone()
    for row in (0, 5):
        text, length = tokens[row, 0], int(batch.lengths_BU[row, 0])
        text[text < 11] = 77
        text[length:] = 0
        text[: len(opening)] = torch.tensor(opening)
        text[length - 1] = EOS_ID
    return replace(batch, tokens_BUT=tokens, system_query=SYSTEM_QUERY if template == "alpha" else ())


def written_out(stage: SmatStage, batch: TurnBatch, depth: int | None = None, train_mode: bool = False) -> Tensor:
    """The loss of each turn of a single dialogue without padding, [turns], nan for a system prompt."""
    model: Any = stage.model
    config = stage.run.model
    memory = stage.first_memory(stage.prepare(batch, 0), CPU)
    turns = [batch.tokens_BUT[0, u, :length][None] for u, length in enumerate(batch.lengths_BU[0].tolist()) if length]
    has_system = bool(are_system_prompts(turns[0].numpy(), batch.system_query))
    losses = []
    for row, tokens in enumerate(turns):
        turn = row - has_system
        if row:
            if depth and turn % depth == 0:
                memory = memory.detach()
            before = turns[row - 1]
            places = torch.arange(before.shape[1])[None]
            encoded = model.encoder(model.embedding(before), places)
            memory, _ = write_turn(model, memory, encoded, torch.ones_like(before, dtype=torch.bool))
        assert memory.shape == (config.layers, 1, config.stm_slots, config.dim)
        if turn < 0:
            losses.append(torch.tensor(float("nan")))
            continue
        hidden = model.decoder(model.embedding(tokens), torch.arange(tokens.shape[1])[None], memory).hidden_BTD
        labels = torch.from_numpy(answer_labels(tokens.numpy(), train_mode))
        logits = model.lm_head.logits(hidden)
        losses.append(F.cross_entropy(logits[0], labels[0], ignore_index=NO_LOSS, reduction="sum"))
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("recompute", "depth", "train_mode", "template"),
    [
        (True, 1, False, "beta"),
        (False, 1, True, "alpha"),
        (True, 2, True, "alpha"),
        (False, 2, False, "beta"),
        (False, None, True, "beta"),
    ],
)
@pytest.mark.slow
def test_the_stage_is_its_formula_dialogue_by_dialogue(
    recompute: bool, depth: int | None, train_mode: bool, template: str
) -> None:
    """With unequal turns, a system prompt, and dialogues of nothing but one."""
    stage = stage_of(depth=depth, recompute_turns=recompute, train_mode=train_mode)
    batch = system_batch(template)
    output = output_of(stage, batch)
    found = gradients(stage, output)
    each = [written_out(stage, alone(batch, row), depth, train_mode) for row in range(len(DIALOGUES))]
    by_turn = torch.zeros(3)
    for losses in each:
        own = losses[~losses.isnan()].detach()
        by_turn[: len(own)] += own
    total = torch.cat(each).nansum()
    assert relative(output.sums_J[0], total) < 1e-5
    assert relative(output.sums_J[[term(stage, f"turn-{turn}") for turn in (1, 2, 3)]], by_turn) < 1e-5
    stage.zero_grad()
    total.backward()
    for name, parameter in stage.model.named_parameters():
        assert parameter.grad is not None
        assert relative(found[name], parameter.grad) < 1e-4, name


@KEPT_OR_NOT
@pytest.mark.slow
def test_a_dialogue_does_not_depend_on_its_neighbours(recompute: bool) -> None:
    """Neither on how many turns they have nor on how long these are."""
    stage, batch = stage_of(recompute_turns=recompute), system_batch()
    whole = output_of(stage, batch)
    each = [output_of(stage, alone(batch, row)) for row in range(len(DIALOGUES))]
    assert relative(torch.stack([one.sums_J for one in each]).sum(0), whole.sums_J) < 1e-5
    assert torch.equal(sum(one.hits_J for one in each), whole.hits_J)
    assert torch.equal(sum(one.expert_counts_ME for one in each), whole.expert_counts_ME)
    counts = [stage.counts(stage.prepare(alone(batch, row), 0)) for row in range(len(DIALOGUES))]
    assert torch.equal(sum(counts), stage.counts(stage.prepare(batch, 0)))


def test_what_counts_is_what_is_there() -> None:
    stage = stage_of()
    batch = system_batch()
    counts = dict(zip([each.name for each in stage.terms], stage.counts(stage.prepare(batch, 0)).tolist(), strict=True))
    read = batch.real_tokens - DIALOGUES[0][0] - DIALOGUES[5][0]
    assert counts["balance"] == counts["z"] == read
    assert counts["rms"] == sum(map(len, DIALOGUES)) - 2
    assert counts["change"] == sum(len(dialogue) - 1 for dialogue in DIALOGUES)
    assert counts["ar"] == counts["turn-1"] + counts["turn-2"] + counts["turn-3"]
    assert (counts["recall"], counts["recall-1"], counts["recall-2"]) == (2, 1, 1)
    moe = stage.run.model.decoder.moe
    chosen_ME = output_of(stage, batch).expert_counts_ME
    assert chosen_ME.sum(1).tolist() == [read * moe.active] * stage.run.model.moe_layers
    assert stage.views(stage.prepare(batch, None))["zero"].pairs == batch.pairs


def test_rows_are_as_wide_as_the_longest_turn_needs() -> None:
    stage, whole = stage_of(), dialogue_batch()
    few = torch.tensor([0, 2, 4])  # Of up to 20 tokens.
    tokens_BUT, lengths_BU, samples_B = whole.tokens_BUT[few], whole.lengths_BU[few], whole.samples_B[few]
    narrow = TurnBatch(tokens_BUT[..., :20], lengths_BU, samples_B, whole.recalls_BU3[few])
    wide = replace(narrow, tokens_BUT=torch.nn.functional.pad(tokens_BUT, (0, 40), value=7))
    micro = stage.prepare(wide, 0)
    assert micro.rows.tokens_RT.shape[1] == micro.rows.written_RT.shape[1] == 24
    expected, actual = output_of(stage, narrow), stage(micro, load_of(stage))
    torch.testing.assert_close(actual.sums_J, expected.sums_J, rtol=1e-6, atol=1e-6)
    assert torch.equal(actual.hits_J, expected.hits_J)


def test_what_a_turn_that_is_not_there_says_changes_nothing() -> None:
    stage, batch = stage_of(), dialogue_batch()
    there = torch.arange(batch.tokens_BUT.shape[2]) < batch.lengths_BU.unsqueeze(2)
    padding = there | (batch.lengths_BU == 0).unsqueeze(2)
    assert not bool(batch.tokens_BUT[~padding].any())
    tokens = torch.where(batch.lengths_BU.unsqueeze(2) == 0, torch.tensor(77), batch.tokens_BUT)
    tokens[..., 0] = BOS_ID
    other = output_of(stage, replace(batch, tokens_BUT=tokens))
    assert torch.equal(other.sums_J, output_of(stage, batch).sums_J)


def test_turns_that_are_recomputed_are_turns_that_are_kept() -> None:
    outputs, found = [], []
    for recompute in (True, False):
        stage = stage_of(recompute_turns=recompute)
        outputs.append(output_of(stage, dialogue_batch()))
        found.append(gradients(stage, outputs[-1]))
    torch.testing.assert_close(outputs[0].sums_J, outputs[1].sums_J)
    assert torch.equal(outputs[0].expert_counts_ME, outputs[1].expert_counts_ME)
    assert all(relative(found[0][name], gradient) < 1e-4 for name, gradient in found[1].items())


def test_the_last_turn_is_not_written_and_no_turn_reads_itself() -> None:
    """What the second turn says moves the loss of the third turn alone; the third moves no other."""
    stage, batch = stage_of(recompute_turns=False), alone(dialogue_batch(), 0)
    before = output_of(stage, batch)
    places = [term(stage, f"turn-{turn}") for turn in (1, 2, 3)]
    for turn in range(3):
        tokens = batch.tokens_BUT.clone()
        asked = slice(2, 4)
        tokens[0, turn, asked] = (tokens[0, turn, asked] + 1 - 11) % 100 + 11
        after = output_of(stage, replace(batch, tokens_BUT=tokens))
        moved = [bool(before.sums_J[at] != after.sums_J[at]) for at in places]
        assert moved == [each >= turn for each in range(3)]


def test_each_view_reads_its_memory() -> None:
    stage, batch = stage_of(), dialogue_batch()
    micro = stage.prepare(batch, None)
    assert list(stage.views(micro)) == ["true", "fresh", "zero", "foreign"]
    read: dict[str, list[Tensor]] = {}
    decoded = stage._decoded
    for view, seen in stage.views(micro).items():
        stage._decoded = lambda memory, *rest, view=view: (  # type: ignore[method-assign]
            read.setdefault(view, []).append(memory),
            decoded(memory, *rest),
        )[1]
        stage(seen, load_of(stage))
    true, fresh, zero, foreign = (torch.cat(read[view], dim=1) for view in read)
    assert not zero.any()
    order = [sample % ROWS for sample in micro.samples]
    readers = micro.rows.readers_R.tolist()
    turns = [[0, *DIALOGUES[row]].index(length) for row, length in enumerate(next(zip(*DIALOGUES, strict=False)))]
    assert set(turns) == {1}
    first = stage.first_memory(micro, CPU)
    for at, reader in enumerate(readers):
        turn = readers[:at].count(reader)
        assert torch.equal(fresh[:, at], first[:, reader])
        other = order.index(order[reader] ^ 1)
        last = min(turn, len(DIALOGUES[order[other]]) - 1)
        theirs = [place for place, each in enumerate(readers) if each == other][last]
        assert torch.equal(foreign[:, at], true[:, theirs])
        assert torch.equal(true[:, at], first[:, reader]) == (turn == 0)
    counts = {view: stage.counts(seen) for view, seen in stage.views(micro).items()}
    assert counts["true"][term(stage, "change")] > counts["zero"][term(stage, "change")] == 0
    with pytest.raises(ValueError, match="in pairs, but the micro-batch has 1"):
        stage.views(stage.prepare(dialogue_batch().micro_batches(1)[0], None))


# ---------------------------------------------------------------------------------------------------------------------
# What trains when
# ---------------------------------------------------------------------------------------------------------------------


LATER = {"memory_after": 2 * STEP, "encoder_after": 4 * STEP}


@pytest.mark.parametrize(("precision", "recompute"), [("float32", True), ("bfloat16", False)])
@pytest.mark.slow
def test_parts_begin_to_train_one_after_another(precision: str, recompute: bool) -> None:
    stage = stage_of(recompute_turns=recompute, precision=precision, weight_decay=0.5, **LATER)
    engine = PlainEngine(stage, stage.run, CPU)
    for number in range(6):
        before = {name: master.detach().clone() for name, master in engine.masters.items()}
        rates = {group: 1e-2 * rate for group, rate in stage.rates(number * STEP).items()}
        micros = [stage.prepare(part, number * STEP) for part in dialogue_batch(3 * number).micro_batches(4)]
        engine.train_step(micros, rates)
        moved = {name.split(".")[0]: False for name in before}
        for name, master in engine.masters.items():
            moved[name.split(".")[0]] |= not torch.equal(before[name], master)
        trains = {"memory_attention": number >= 2, "encoder": number >= 4}
        assert moved == {part: trains.get(part, True) for part in moved}
    # What begins later corrects its moments as on ranks whose optimizer steps over flat tensors.
    assert {state["step"].item() for state in engine.optimizer.state.values()} == {6}


def test_what_is_not_free_has_no_gradient_and_lets_none_through() -> None:
    batch = dialogue_batch()
    stage = stage_of(**LATER)
    free = gradients(stage, output_of(stage, batch, 4 * STEP))
    fixed = gradients(stage, output_of(stage, batch, 2 * STEP))
    alone_ = gradients(stage, output_of(stage, batch, 0))
    for name, gradient in free.items():
        part = name.split(".")[0]
        # Of a single layer the mean over layers is itself, so that it does not matter how the two are mixed.
        assert bool(gradient.any()) or "mixing_gate" in name
        if "mixing_gate" in name:
            continue
        assert bool(fixed[name].any()) == (part != "encoder")
        assert bool(alone_[name].any()) == (part not in ("encoder", "memory_attention"))
    # The embedding learns from what the decoder reads, not through an encoder that stands still.
    assert not torch.equal(free["embedding.weight"], fixed["embedding.weight"])
    torch.testing.assert_close(fixed["embedding.weight"], alone_["embedding.weight"])


def test_a_part_that_is_freed_warms_up() -> None:
    stage = stage_of(warmup_tokens=4 * STEP, **LATER)
    rates = [stage.rates(number * STEP) for number in range(9)]
    assert [each["memory"] for each in rates] == [0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1]
    assert [each["encoder"] for each in rates] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]
    assert {each["decoder"] for each in rates} == {1.0}
    assert set(stage_of(warmup_tokens=4 * STEP).rates(0).values()) == {1.0}
    with pytest.raises(ValueError, match=r"encoder_after \(5\) is less than memory_after \(6\)"):
        SmatConfig(memory_after=6, encoder_after=5)


@KEPT_OR_NOT
def test_every_part_has_a_gradient_in_a_step_without_a_second_turn(recompute: bool) -> None:
    """Ranks and steps then compute the same graph, whatever their dialogues are."""
    stage = stage_of(recompute_turns=recompute)
    batch = dialogue_batch(1)
    assert batch.tokens_BUT.shape[1] == 1
    output = output_of(stage, batch)
    stage.zero_grad()
    output.sums_J[0].backward()
    for name, parameter in stage.model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == (name.split(".")[0] not in ("encoder", "memory_attention")), name


def test_a_batch_of_blanks_counts_for_nothing() -> None:
    stage, batch = stage_of(), dialogue_batch()
    blank = replace(batch, tokens_BUT=torch.zeros_like(batch.tokens_BUT), lengths_BU=torch.zeros_like(batch.lengths_BU))
    micro = stage.prepare(blank, None)
    assert not stage.counts(micro).any()
    for view in stage.views(micro).values():
        output = stage(view, load_of(stage))
        assert not output.sums_J.any()
        assert not output.expert_counts_ME.any()


# ---------------------------------------------------------------------------------------------------------------------
# Recall
# ---------------------------------------------------------------------------------------------------------------------


def recall_batch() -> TurnBatch:
    """Two dialogues: [BOS][Q] q q [A] a b c [EOS] in each turn, in the order in which they are not computed."""
    text = torch.tensor([BOS_ID, QUERY_ID, 20, 21, ANSWER_ID, 30, 31, 32, EOS_ID])
    tokens = text.repeat(2, 6, 1)
    lengths = torch.full((2, 6), len(text))
    lengths[0, 4:] = 0
    recalls = torch.zeros(2, 6, 3, dtype=torch.int64)
    recalls[0, 1], recalls[0, 2] = torch.tensor([1, 5, 7]), torch.tensor([2, 6, 8])
    # Of distance 5 there is no figure; the last one begins where nothing is answered yet.
    recalls[1, 1], recalls[1, 5], recalls[1, 2] = (torch.tensor(each) for each in ([1, 7, 8], [5, 5, 6], [2, 3, 6]))
    return TurnBatch(tokens, lengths, torch.tensor([7, 8]), recalls)


def test_values_are_labels_of_the_turn_that_asks() -> None:
    stage = stage_of(turns=6)
    micro = stage.prepare(recall_batch(), 0)
    rows = micro.rows
    assert micro.samples == (8, 7)
    assert rows.labels == 10 * 4
    assert rows.targets_P[rows.value_N].tolist() == [32, 30, 31, 31, 32, 30]
    assert rows.turn_P[rows.value_N].tolist() == [1, 1, 1, 2, 2, 5]
    assert rows.ask_N.tolist() == [0, 1, 1, 2, 2, 3]
    assert rows.distance_N.tolist() == [0, 0, 1, 4]
    assert stage.distances == (1, 2, 3, 4)
    names = [each.name for each in stage.terms]
    recalls = [names.index(f"recall-{distance}") for distance in stage.distances]
    assert stage.counts(micro)[recalls].tolist() == [2, 1, 0, 0]
    assert stage.counts(micro)[names.index("recall")] == 4


@KEPT_OR_NOT
@pytest.mark.parametrize("train_mode", [True, False])
def test_loss_and_accuracy_are_told_by_part_of_the_answer(recompute: bool, train_mode: bool) -> None:
    stage = stage_of(recompute_turns=recompute, train_mode=train_mode)
    batch = dialogue_batch()
    micro = stage.prepare(batch, 0)
    output, counts = stage(micro, load_of(stage)), stage.counts(micro)
    parts = [term(stage, name) for name in ("thinking", "answer", "call", "eos")]
    turns = int((batch.lengths_BU > 0).sum())
    assert counts[parts].tolist() == [0, counts[0] - turns, 0, turns]
    assert output.sums_J[parts].sum().item() == pytest.approx(output.sums_J[0].item(), rel=1e-5)
    assert output.hits_J[parts].sum() == output.hits_J[0]
    ends = micro.rows.targets_P == EOS_ID
    assert torch.equal(micro.rows.part_P, torch.where(ends, 3, 1))


@KEPT_OR_NOT
@pytest.mark.slow
def test_the_gate_of_each_layer_is_told_of_what_is_written(recompute: bool) -> None:
    model = model_config("memory_attention.gate={kind: static}")
    stage = stage_of(model=model, recompute_turns=recompute)
    weights = torch.tensor([1.0, -2.0])
    with torch.no_grad():
        for layer, weight in zip(stage.model.memory_attention.layers, weights, strict=True):  # type: ignore[union-attr]
            layer.write_gate.weight.fill_(weight)  # type: ignore[union-attr]
    gates = [term(stage, name) for name in ("gate-1", "gate-2")]
    for batch in (dialogue_batch(), system_batch(), dialogue_batch(1)):
        for memory, view in stage.views(stage.prepare(batch, 0)).items():
            found, counts = stage(view, load_of(stage)).sums_J[gates], stage.counts(view)[gates]
            writes = view.rows.writes if memory in ("true", "foreign") else 0
            assert counts.tolist() == [writes] * 2
            torch.testing.assert_close(found, writes * weights.sigmoid())


def test_recalled_is_what_is_right_in_all_its_tokens() -> None:
    stage = stage_of(turns=6)
    micro = stage.prepare(recall_batch(), 0)
    rows, nothing = micro.rows, torch.zeros(())
    hits_P = torch.ones(rows.labels, dtype=torch.bool)
    hits_P[rows.value_N[2]] = False
    losses_P = torch.arange(rows.labels).float()
    part = Decoded(
        losses_P.sum(), losses_P, hits_P, nothing, nothing, torch.zeros(3, 8), nothing, nothing, torch.zeros(2)
    )
    output = stage._output(rows, [part])
    lost = losses_P[rows.value_N].tolist()
    assert output.hits_J[term(stage, "recall")] == 3
    recalls = [term(stage, f"recall-{distance}") for distance in stage.distances]
    assert output.hits_J[recalls].tolist() == [1, 1, 0, 0]
    assert output.sums_J[recalls].tolist() == [sum(lost[:3]), sum(lost[3:5]), 0, 0]
    assert output.sums_J[term(stage, "recall")] == sum(lost)
    assert output.hits_J[term(stage, "turn-2")] == 7
    assert output.sums_J[term(stage, "turn-6")] == losses_P[rows.turn_P == 5].sum()


@pytest.mark.slow
def test_hits_are_those_of_the_decoder() -> None:
    stage = stage_of(recompute_turns=False)
    batch = dialogue_batch()
    output = output_of(stage, batch)
    engine = PlainEngine(stage, stage.run, CPU)
    for number in range(15):
        engine.train_step([stage.prepare(batch, number)], dict.fromkeys(stage.rates(0), 1e-2))
    learnt = output_of(stage, batch)
    names = [term(stage, name) for name in ("ar", "recall", "turn-3")]
    assert bool((learnt.hits_J[names] > output.hits_J[names]).all())
    assert bool((learnt.sums_J[names] < output.sums_J[names]).all())


def test_operations_are_those_of_what_is_read_and_written() -> None:
    config = run_config(stage="smat", turns=4)
    work = Work(1000, 20_000, {"ar": 300.0, "balance": 900.0, "rms": 40.0, "change": 30.0})
    parts = SmatStage.flops_by_part(config, work)
    assert set(parts) == {
        "encoder", "mlm_head", "self_attention", "cross_attention", "feed_forward", "lm_head", "memory_attention",
    }  # fmt: skip
    still = SmatStage.flops_by_part(config, replace(work, counts=dict(work.counts, change=0.0)))
    assert still["encoder"] == still["memory_attention"] == parts["mlm_head"] == 0
    assert parts["encoder"] > 0 < parts["memory_attention"]
    assert parts["lm_head"] == 6 * 300 * (config.model.dim + 1) * config.model.vocab_size
    expected = SmatStage.expected_work(config, 6400, 64)
    assert expected.counts == {"ar": 6400, "balance": 6400, "rms": 100, "change": 75}
