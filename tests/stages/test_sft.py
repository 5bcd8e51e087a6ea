"""Fine-tuning on interactions: which tokens carry loss, and that interactions of a row are strangers to each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from model.conformance import vectors
from tiny import TOKENS, interaction_batch, make_stage, model_config, run_config
from torch import Tensor

from rxt_dist.data.loader import TokenBatch, token_batch
from rxt_dist.data.masking import IGNORED_LABEL
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import ConfigError
from rxt_dist.model.init import initialise

SFT = pytest.mark.parametrize("kind", ["sft", "decoder-sft"])
CPU = torch.device("cpu")


def rows_of(ids_BT: Tensor, lengths_B: Tensor) -> TokenBatch:
    rows = len(ids_BT)
    return token_batch(
        ids_BT.to(torch.int16),
        np.ones(rows, np.int64),
        lengths_B.numpy(),
        np.zeros(rows, np.int64),
        np.arange(rows, dtype=np.int64),
    )


def stage_of(kind: str, **changes: Any) -> Any:
    stage = make_stage(run_config(stage=kind, **changes))
    initialise(stage.model, 0)
    return stage


@SFT
@pytest.mark.parametrize("template", ["alpha", "beta"])
@pytest.mark.parametrize(("train_mode", "expected"), [(True, "labels"), (False, "labels_without_mode")])
def test_labels_are_the_references(kind: str, template: str, train_mode: bool, expected: str) -> None:
    """Those of the reference but for [PAD], which is never a label; the last row of Beta is a system prompt, of which
    the reference trains the [EOS] too."""
    stored = vectors("sft_masks")
    wanted_BT = stored[f"{template}.{expected}"]
    micro = stage_of(kind, train_mode=train_mode).prepare(
        rows_of(stored[f"{template}.ids"], stored[f"{template}.lengths"]), 0
    )
    rows = len(wanted_BT) - (template == "beta")
    assert torch.equal(micro.labels_BT[:rows], wanted_BT[:rows])
    assert (micro.labels_BT[rows:] == IGNORED_LABEL).all()
    assert micro.targets == int((micro.labels_BT != IGNORED_LABEL).sum())


@SFT
def test_the_end_of_every_whole_answer_is_learnt_and_padding_never(kind: str) -> None:
    stored = vectors("sft_masks")
    for template, whole in (("alpha", [0, 1]), ("beta", range(8))):
        ids, lengths = stored[f"{template}.ids"], stored[f"{template}.lengths"]
        labels_BT = stage_of(kind).prepare(rows_of(ids, lengths), 0).labels_BT
        assert not (labels_BT == 0).any()
        answered = [row for row in whole if (labels_BT[row] != IGNORED_LABEL).any()]
        assert len(answered) >= len(whole) - 1
        assert all(labels_BT[row, lengths[row] - 2] == 3 for row in answered)


@SFT
def test_interactions_of_a_row_do_not_see_each_other(kind: str) -> None:
    """The loss of a row's first interaction stays the same to the last bit, whatever its neighbour says."""
    stage = stage_of(kind)
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    losses = []
    for seed in (0, 1):
        batch = interaction_batch().first(1)
        first = int(batch.cu_seqlens[1])
        tokens_T = batch.tokens_BT[0]
        other = torch.from_numpy(np.random.default_rng(seed).integers(11, 128, TOKENS).astype(np.int16))
        behind = torch.arange(TOKENS) >= first
        tokens_T[behind & (tokens_T > 10)] = other[behind & (tokens_T > 10)]
        micro = stage.views(stage.prepare(batch, None))
        alone = next(iter(micro.values()))
        alone.labels_BT[:, first:] = IGNORED_LABEL
        losses.append(stage(alone, load).sums_J[0])
    assert losses[0] > 0
    assert torch.equal(losses[0], losses[1])


def test_the_encoder_restores_tokens_of_the_query_too() -> None:
    micro = stage_of("sft", mlm_probability=0.9).prepare(interaction_batch(), 0)
    query = micro.labels_BT.flatten()[micro.masked_P - 1] == IGNORED_LABEL
    assert query.sum() > 20
    assert (~query).sum() > 20


def test_a_stage_in_which_the_model_chooses_its_mode_has_more_labels() -> None:
    batch = interaction_batch()
    fewer, more = (stage_of("sft", train_mode=mode).prepare(batch, 0) for mode in (False, True))
    added = more.labels_BT[(more.labels_BT != fewer.labels_BT)]
    interactions = int((batch.numbers_I >= 0).sum())
    assert len(added) == interactions
    assert set(added.tolist()) == {6, 7}
    assert more.targets - fewer.targets == interactions


PARTS = ("thinking", "answer", "call", "eos")


def parts_written_out(ids_T: list[int], labels_T: list[int]) -> list[int]:
    """How many labels of a row are of each part: a label's part is the last marker up to the token that it names."""
    counted, part = [0, 0, 0, 0], None
    for at, token in enumerate(ids_T):
        part = {7: 0, 6: 1, 8: 2, 3: 3}.get(token, part)
        if at and labels_T[at - 1] != IGNORED_LABEL:
            assert part is not None
            counted[part] += 1
    return counted


@SFT
@pytest.mark.parametrize("train_mode", [True, False])
def test_loss_and_accuracy_are_told_by_part_of_the_answer(kind: str, train_mode: bool) -> None:
    """Each label is of one part, and a marker is of the part that it begins."""
    stage = stage_of(kind, train_mode=train_mode)
    stored = vectors("sft_masks")
    names = [term.name for term in stage.terms]
    assert tuple(names[-4:]) == PARTS
    assert not stage.weights()[-4:].any()
    for template in ("alpha", "beta"):
        ids_BT, lengths_B = stored[f"{template}.ids"], stored[f"{template}.lengths"]
        micro = stage.prepare(rows_of(ids_BT, lengths_B), 0)
        wanted = [parts_written_out(*row) for row in zip(ids_BT.tolist(), micro.labels_BT.tolist(), strict=True)]
        assert stage.counts(micro)[-4:].tolist() == np.sum(wanted, axis=0).tolist()
        assert sum(micro.part_targets) == micro.targets
        assert (micro.part_targets[0] > 0) == (micro.part_targets[2] > 0) == (template == "beta")
    batch = interaction_batch()
    load = PlainEngine(stage, stage.run, CPU).routing.load_ME
    micro = stage.prepare(batch, None)
    output = stage(micro, load)
    assert output.sums_J[-4:].sum().item() == pytest.approx(output.sums_J[0].item(), rel=1e-6)
    assert output.hits_J[-4:].sum() == output.hits_J[0]
    for number in range(4):
        alone = replace(micro, labels_BT=micro.labels_BT.masked_fill(micro.parts_BT != number, IGNORED_LABEL))
        found = stage(alone, load)
        assert output.sums_J[number - 4].item() == pytest.approx(found.sums_J[0].item(), rel=1e-6)
        assert output.hits_J[number - 4] == found.hits_J[0]


def test_a_model_without_encoder_is_refused() -> None:
    config = run_config(stage="sft", model=model_config("encoder=null", "memory_attention=null"))
    with pytest.raises(ConfigError, match="stage 'sft' needs the encoder"):
        config.stage.check(config.model)
