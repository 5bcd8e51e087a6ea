"""Joint pre-training: who sees what, what carries gradients, and what the randomness depends on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LENGTHS, TOKENS, make_stage, packed_batch, relative, run_config
from torch import Tensor

from rxt_dist.config.stages import LinearSchedule
from rxt_dist.data.loader import TokenBatch, token_batch
from rxt_dist.model.attention import Documents
from rxt_dist.stages.joint import JointStage, cheated_context

LOAD = torch.full((3, 8), 1 / 8)
DOCUMENT_LENGTHS = (9, 14, 6)


def batch_of(*documents: np.ndarray, width: int = TOKENS, sample: int = 0) -> TokenBatch:
    """One row with these documents, padded to `width`."""
    tokens = np.zeros((1, width), np.uint16)
    joined = np.concatenate(documents)
    tokens[0, : len(joined)] = joined
    lengths = np.array([len(document) for document in documents])
    narrow = torch.from_numpy(tokens.view(np.int16))
    return token_batch(narrow, np.array([len(documents)]), lengths, np.zeros(1, np.int64), np.array([sample]))


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    generator = np.random.default_rng(5)
    return [generator.integers(11, 128, length).astype(np.uint16) for length in DOCUMENT_LENGTHS]


@pytest.fixture(scope="module")
def stage() -> JointStage:
    return make_stage(run_config(mlm_probability=0.3))


def only(stage: JointStage, batch: TokenBatch, start: int, masked_inside: list[int]) -> Any:
    """A micro-batch that is scored on nine tokens from `start`: next tokens, and the masked ones there."""
    length = DOCUMENT_LENGTHS[0]
    micro = stage.prepare(batch, None)
    labels = torch.full_like(micro.labels_BT, -100)
    labels[0, start : start + length] = micro.labels_BT[0, start : start + length]
    masked = torch.tensor(masked_inside) + start
    encoder_tokens = micro.tokens_BT.clone()
    encoder_tokens[0, masked] = 4
    targets = micro.tokens_BT[0, masked]
    return replace(micro, labels_BT=labels, masked_P=masked, masked_targets_P=targets, encoder_tokens_BT=encoder_tokens)


def losses_and_gradients(stage: JointStage, micro: Any) -> tuple[list[float], list[Tensor]]:
    sums = stage(micro, LOAD).sums_J[:2]
    trained = [parameter for parameter in stage.parameters() if parameter.requires_grad]
    found = torch.autograd.grad(sums.sum(), trained, allow_unused=True, materialize_grads=True)
    return sums.tolist(), list(found)


def test_a_document_does_not_know_its_neighbours(stage: JointStage, documents: list[np.ndarray]) -> None:
    """Losses and gradients of one document: alone in a row, alone without padding, and between others.

    Encoder, decoder self-attention and memory cross-attention would each show a leak; so would positions that count on
    from the neighbour.
    """
    first, second, third = documents
    alone = only(stage, batch_of(first, width=len(first)), 0, [1, 4, 7])
    expected, gradients = losses_and_gradients(stage, alone)
    assert expected[0] > 1
    assert expected[1] > 1
    for neighbours, start in (
        ([first], 0),
        ([first, second, third], 0),
        ([second, first, third], len(second)),
        ([third, second, first], len(third) + len(second)),
    ):
        micro = only(stage, batch_of(*neighbours), start, [1, 4, 7])
        losses, found = losses_and_gradients(stage, micro)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert max(relative(mine, alone_) for mine, alone_ in zip(found, gradients, strict=True)) < 1e-4


@pytest.mark.parametrize("part", ["documents", "positions_BT"])
def test_documents_would_leak_without_their_boundaries_or_positions(
    stage: JointStage, documents: list[np.ndarray], part: str
) -> None:
    """The test above can fail: one long document in place of three changes the loss."""
    micro = only(stage, batch_of(*documents), DOCUMENT_LENGTHS[0] + DOCUMENT_LENGTHS[1], [1])
    one = {
        "documents": Documents(torch.tensor([0, TOKENS], dtype=torch.int32), (TOKENS,)),
        "positions_BT": torch.arange(TOKENS).unsqueeze(0) ** 2,
    }
    changed = replace(micro, **{part: one[part]})
    assert stage(changed, LOAD).sums_J[0].item() != pytest.approx(stage(micro, LOAD).sums_J[0].item(), rel=1e-5)


def test_only_the_embedding_joins_decoder_and_encoder(stage: JointStage) -> None:
    micro = stage.prepare(packed_batch(), 0)
    names = [name for name, parameter in stage.model.named_parameters() if parameter.requires_grad]
    trained = [parameter for parameter in stage.model.parameters() if parameter.requires_grad]
    touched: dict[str, set[str]] = {}
    for index, term in enumerate(stage.terms):
        sums = stage(micro, LOAD).sums_J
        gradients = torch.autograd.grad(sums[index], trained, allow_unused=True, materialize_grads=True)
        touched[term.name] = {name for name, gradient in zip(names, gradients, strict=True) if bool(gradient.any())}
    encoder = {name for name in names if name.startswith(("encoder", "mlm_head"))}
    decoder = {name for name in names if name.startswith(("decoder", "lm_head"))}
    assert touched["ar"] == decoder | {"embedding.weight"}
    assert touched["mlm"] == encoder | {"embedding.weight"}
    for term in ("balance", "z"):
        assert touched[term] <= decoder | {"embedding.weight"}
        assert "decoder.layers.3.feed_forward.routed.gate.weight" in touched[term]
    assert encoder | decoder | {"embedding.weight"} == set(names)


def test_memory_attention_is_not_built(stage: JointStage) -> None:
    assert stage.run.model.memory_attention is not None
    assert stage.model.memory_attention is None
    assert all(parameter.requires_grad for parameter in stage.model.parameters())


def test_terms_do_not_depend_on_how_rows_are_split(stage: JointStage) -> None:
    """Noise and masks belong to a row, whatever micro-batch it is computed in."""
    batch = packed_batch(3)
    whole = stage(stage.prepare(batch, 0), LOAD)
    for rows in (1, 2, 4):
        micros = [stage.prepare(part, 0) for part in batch.micro_batches(rows)]
        outputs = [stage(micro, LOAD) for micro in micros]
        torch.testing.assert_close(sum(output.sums_J for output in outputs), whole.sums_J, rtol=1e-5, atol=0)
        assert torch.equal(sum(output.hits_J for output in outputs), whole.hits_J)
        assert torch.equal(sum(output.expert_counts_ME for output in outputs), whole.expert_counts_ME)
        assert torch.equal(sum(stage.counts(micro) for micro in micros), stage.counts(stage.prepare(batch, 0)))


ENCODED = torch.randn(2, 4, 16, 8, generator=torch.Generator().manual_seed(0))


def test_noise_is_a_function_of_seed_and_sample() -> None:
    whole = cheated_context(ENCODED, (7, 3, 10**12, 4), 0, 0.5, 0.3)
    torch.rand(5)  # The global generator has no part in it.
    assert torch.equal(cheated_context(ENCODED, (7, 3, 10**12, 4), 0, 0.5, 0.3), whole)
    for row, sample in enumerate((7, 3, 10**12, 4)):
        alone = cheated_context(ENCODED[:, row : row + 1], (sample,), 0, 0.5, 0.3)
        assert torch.equal(alone[:, 0], whole[:, row])
    # The same row in another epoch stands at another position, another run has another seed.
    same_data = ENCODED[:, :1].expand(-1, 2, -1, -1)
    two = cheated_context(same_data, (7, 8), 0, 0.5, 0.3)
    assert not torch.isclose(two[:, 0], two[:, 1]).any()
    other = cheated_context(ENCODED, (7, 3, 10**12, 4), 1, 0.5, 0.3)
    assert not torch.isclose(other, whole).any()


def test_noise_and_masking_have_the_stated_levels() -> None:
    ones = torch.ones(3, 4, 200, 32)
    noised = cheated_context(ones, range(4), 0, noise=0.7, masking=0.0)
    assert (noised - 1).std().item() == pytest.approx(0.7, rel=0.02)
    assert (noised - 1).mean().item() == pytest.approx(0.0, abs=0.01)
    masked = cheated_context(ones, range(4), 0, noise=0.0, masking=0.3)
    assert set(masked.unique().tolist()) == {0.0, 1.0}, "kept positions are not rescaled"
    positions_LBT = masked.mean(-1)
    assert set(positions_LBT.unique().tolist()) == {0.0, 1.0}, "a position is kept or zeroed as a whole"
    assert positions_LBT.mean().item() == pytest.approx(0.7, abs=0.04)
    assert not torch.equal(positions_LBT[0], positions_LBT[1]), "layers draw for themselves"
    assert not cheated_context(ones, range(4), 0, 0.0, 1.0).any()


def test_levels_follow_their_schedules_and_are_off_in_evaluation() -> None:
    config = run_config(
        memory_noise=LinearSchedule(start=0.5, end=1.0, tokens=1000),
        memory_masking=LinearSchedule(start=0.15, end=0.5, tokens=500),
    )
    stage, batch = make_stage(config), packed_batch()
    for tokens, noise, masking in ((0, 0.5, 0.15), (250, 0.625, 0.325), (500, 0.75, 0.5), (5000, 1.0, 0.5)):
        micro = stage.prepare(batch, tokens)
        assert (micro.noise, micro.masking) == pytest.approx((noise, masking))
    micro = stage.prepare(batch, None)
    assert (micro.noise, micro.masking) == (0.0, 0.0)
    encoded = torch.randn(2, 8, TOKENS, 32)
    assert torch.equal(stage._memory(encoded, micro), encoded)
    assert bool((micro.encoder_tokens_BT == 4).any()), "restoring masked tokens is what evaluation measures"


def test_evaluation_repeats_itself(stage: JointStage) -> None:
    micro = stage.prepare(packed_batch(), None)
    with torch.no_grad():
        first, second = stage(micro, LOAD).sums_J, stage(micro, LOAD).sums_J
    assert torch.equal(first, second)


def test_memory_kinds(stage: JointStage) -> None:
    micro = stage.prepare(packed_batch(), None)
    encoded = torch.randn(2, 8, TOKENS, 32)
    assert torch.equal(stage._memory(encoded, micro.with_memory("true")), encoded)
    assert not stage._memory(encoded, micro.with_memory("zero")).any()
    foreign = stage._memory(encoded, micro.with_memory("foreign"))
    for row in range(8):
        assert torch.equal(foreign[:, row], encoded[:, row ^ 1])
    with torch.no_grad():
        losses = {kind: stage(micro.with_memory(kind), LOAD).sums_J for kind in ("true", "zero", "foreign")}
    assert len({loss[0].item() for loss in losses.values()}) == 3
    assert len({loss[1].item() for loss in losses.values()}) == 1, "the encoder does not read the memory"


def test_a_row_alone_has_no_foreign_memory(stage: JointStage) -> None:
    micro = stage.prepare(packed_batch().micro_batches(1)[0], None).with_memory("foreign")
    with pytest.raises(ValueError, match="in pairs"):
        stage(micro, LOAD)


def test_padding_is_no_target(stage: JointStage) -> None:
    """Whatever stands in the padding, and however the encoder is masked, it is neither counted nor scored."""
    batch = packed_batch()
    rows = batch.unpack()
    padding = rows.segments_BT < 0
    assert int(padding.sum()) > 30
    micro = stage.prepare(batch, None)
    targets = int((rows.segments_BT >= 0).sum()) - sum(len(row) for row in LENGTHS)
    valid = int((~padding).sum())
    assert stage.counts(micro).tolist() == [targets, micro.masked_P.numel(), valid, valid]
    assert not padding.flatten()[micro.masked_P].any()
    expected = stage(micro, LOAD)
    other_tokens = torch.where(padding, torch.full_like(rows.tokens_BT, 77), rows.tokens_BT)
    changed = replace(
        micro,
        tokens_BT=other_tokens,
        encoder_tokens_BT=torch.where(padding, other_tokens, micro.encoder_tokens_BT),
    )
    actual = stage(changed, LOAD)
    torch.testing.assert_close(actual.sums_J, expected.sums_J, rtol=1e-5, atol=0)
    assert torch.equal(actual.expert_counts_ME, expected.expert_counts_ME)


def test_nothing_masked_is_no_loss_and_no_nan() -> None:
    stage = make_stage(run_config(mlm_probability=0.0))
    micro = stage.prepare(packed_batch(), 0)
    output = stage(micro, LOAD)
    assert micro.masked_P.numel() == 0
    assert stage.counts(micro)[1].item() == 0
    assert output.sums_J[1].item() == 0.0
    assert output.hits_J[1].item() == 0
    output.sums_J.sum().backward()
    gradients = {name: p.grad for name, p in stage.model.named_parameters() if p.grad is not None}
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients.values())
    assert all(not gradient.any() for name, gradient in gradients.items() if name.startswith(("mlm_head", "encoder")))


def test_hits_are_the_correct_predictions() -> None:
    """A head whose bias always says 42."""
    stage = make_stage(run_config(mlm_probability=0.5))
    with torch.no_grad():
        stage.model.lm_head.output.bias[42] = 1e4
        stage.model.mlm_head.output.bias[42] = 1e4
    batch = packed_batch()
    tokens = torch.where((batch.tokens_BT > 0) & (torch.arange(TOKENS) % 2 == 0), 42, batch.tokens_BT)
    changed = replace(batch, tokens_BT=tokens.to(torch.int16))
    labels = changed.unpack().next_tokens()
    micro = stage.prepare(changed, 0)
    hits = stage(micro, LOAD).hits_J.tolist()
    assert hits == [int((labels == 42).sum()), int((micro.masked_targets_P == 42).sum()), 0, 0]
    assert min(hits[:2]) > 5


def test_weights_come_from_the_configuration(stage: JointStage) -> None:
    assert stage.weights().tolist() == pytest.approx([1.0, 1.0, 0.01, 0.001])
    assert [term.name for term in stage.terms] == ["ar", "mlm", "balance", "z"]
    assert [term.name for term in stage.terms if term.title and term.predicts] == ["ar", "mlm"]
    balanced_by_biases = make_stage(run_config(balancing="bias"))
    assert balanced_by_biases.weights().tolist() == pytest.approx([1.0, 1.0, 0.0, 0.001])
