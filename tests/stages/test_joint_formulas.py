"""A packed joint step against plain formulas, one document at a time: terms, hits, counts and every gradient."""

from __future__ import annotations

import hashlib
from functools import cache
from typing import NamedTuple

import plain_formulas as plain
import pytest
import torch
from tiny import LENGTHS, ROWS, TOKENS, make_stage, model_config, packed_batch, relative, run_config
from torch import Tensor

from rxt_dist.config.model import ModelConfig
from rxt_dist.config.run import RunConfig
from rxt_dist.config.stages import LinearSchedule, LossWeights
from rxt_dist.data.masking import keyed_uniform
from rxt_dist.engine.interface import StepResult
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.losses import objective
from rxt_dist.stages.base import MicroBatch
from rxt_dist.stages.joint import JointStage

SEED, STEP = 11, 8
NOISE, MASKING, MLM_PROBABILITY, MASK_ID, FIRST_ORDINARY = 0.8, 0.35, 0.3, 4, 11
WEIGHTS = {"ar": 1.3, "mlm": 0.7, "balance": 0.4, "z": 0.15}
# Loads of the three MoE layers that nothing could confuse.
LOAD = torch.tensor(
    [[0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.5, 0.3, 0.2, 0.0, 0.0, 0.0], [0.05] * 7 + [0.65]]
)
# An epsilon that is felt, and a base under which the last pair still turns.
COMMON = ("norm_eps=0.05", "rope_base=20", "decoder.moe.active=3", "memory_attention=null")
SHAPES = {
    "beta": (),
    "local": (
        "decoder.moe.bias=local",
        "decoder.moe.shared_bias=local",
        "decoder.attention_bias=true",
        "encoder.attention_bias=true",
        "decoder.self_attention.gated=false",
        "encoder.attention.gated=false",
        "decoder.head_norm=none",
        "decoder.stateless_before=[moe]",
        "decoder.stateless_after=[dense]",
    ),
    "one shared": ("decoder.moe.shared_experts=1", "decoder.moe.bias=none", "decoder.cross_attention.kv_heads=2"),
}


class Expected(NamedTuple):
    """Sums, counts and hits in the order ar, mlm, balance, z."""

    sums: list[Tensor]
    counts: list[int]
    hits: list[int]
    experts_ME: Tensor
    gradients: dict[str, Tensor]


def config_of(shape: str) -> RunConfig:
    config = run_config(
        model=model_config(*COMMON, *SHAPES[shape]),
        mlm_probability=MLM_PROBABILITY,
        weights=LossWeights(**WEIGHTS),
        memory_noise=LinearSchedule(start=NOISE, end=NOISE, tokens=1),
        memory_masking=LinearSchedule(start=MASKING, end=MASKING, tokens=1),
    )
    return config.model_copy(update={"seed": SEED})


def stage_of(shape: str) -> JointStage:
    """A stage whose every parameter matters: biases and norms are not at their start."""
    stage = make_stage(config_of(shape))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return stage


def memory_of(encoded: list[Tensor], sample: int, start: int) -> list[Tensor]:
    """What the decoder reads of a document: its encoding with whole positions zeroed, and noise."""
    digest = hashlib.shake_256(f"rxt-keyed-v1|{SEED}|joint|memory|{sample}".encode()).digest(8)
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    layers, dim = len(encoded), encoded[0].shape[1]
    drawn_LTD = torch.randn(layers, TOKENS, dim, generator=generator).double()
    kept_LT1 = torch.rand(layers, TOKENS, 1, generator=generator) >= MASKING
    part = slice(start, start + len(encoded[0]))
    return [
        e.detach() * kept + NOISE * drawn
        for e, kept, drawn in zip(encoded, kept_LT1[:, part], drawn_LTD[:, part], strict=True)
    ]


@cache
def expected(shape: str) -> Expected:
    config = config_of(shape).model
    parameters = {name: p.detach().double().requires_grad_() for name, p in stage_of(shape).model.named_parameters()}
    batch = packed_batch(STEP)
    tokens_BT = batch.unpack().tokens_BT
    masks_BT = keyed_uniform(SEED, "mlm", batch.samples_B, TOKENS) < MLM_PROBABILITY
    masks_BT &= tokens_BT >= FIRST_ORDINARY
    sums = [torch.zeros((), dtype=torch.float64) for _ in WEIGHTS]
    counts, hits = [0] * 4, [0] * 4
    experts_ME = torch.zeros(config.moe_layers, config.decoder.moe.experts, dtype=torch.int64)
    for row, lengths in enumerate(LENGTHS):
        for number, length in enumerate(lengths):
            start = sum(lengths[:number])
            part = slice(start, start + length)
            of_document = one_document(
                config, parameters, tokens_BT[row, part], masks_BT[row, part], int(batch.samples_B[row]), start
            )
            for term in range(4):
                sums[term] = sums[term] + of_document.sums[term]
                counts[term] += of_document.counts[term]
                hits[term] += of_document.hits[term]
            experts_ME += of_document.experts_ME
    loss = sum(weight * total / count for weight, total, count in zip(WEIGHTS.values(), sums, counts, strict=True))
    assert isinstance(loss, Tensor)
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    return Expected(sums, counts, hits, experts_ME, dict(zip(parameters, gradients, strict=True)))


def one_document(
    config: ModelConfig, parameters: plain.Parameters, tokens_T: Tensor, masked_T: Tensor, sample: int, start: int
) -> Expected:
    table = parameters["embedding.weight"]
    encoded = plain.encoder(parameters, config, table[tokens_T.masked_fill(masked_T, MASK_ID)])
    mlm, mlm_hits = plain.cross_entropy(plain.mlm_logits(parameters, encoded[-1][masked_T]), tokens_T[masked_T])
    memory = memory_of(encoded, sample, start)
    hidden, routed = plain.decoder(parameters, config, table[tokens_T], memory, LOAD.double())
    ar, ar_hits = plain.cross_entropy(plain.linear(parameters, "lm_head.output", hidden[:-1]), tokens_T[1:])
    balance = torch.stack([layer.balance for layer in routed]).mean()
    z = torch.stack([layer.z for layer in routed]).mean()
    length = len(tokens_T)
    counts = [length - 1, int(masked_T.sum()), length, length]
    experts_ME = torch.stack([layer.counts_E for layer in routed])
    return Expected([ar, mlm, balance, z], counts, [ar_hits, mlm_hits, 0, 0], experts_ME, {})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.slow
def test_terms_hits_and_counts_are_those_of_the_formulas(shape: str) -> None:
    stage, wanted = stage_of(shape), expected(shape)
    micro = stage.prepare(packed_batch(STEP), 10**6)
    output = stage(micro, LOAD)
    assert stage.counts(micro).tolist() == wanted.counts
    for term, mine, formula in zip(stage.terms, output.sums_J.tolist(), wanted.sums, strict=True):
        assert mine == pytest.approx(formula.item(), rel=1e-5), term
    assert output.hits_J.tolist() == wanted.hits
    assert torch.equal(output.expert_counts_ME, wanted.experts_ME)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient_is_that_of_the_formulas(shape: str) -> None:
    stage, wanted = stage_of(shape), expected(shape)
    micro = stage.prepare(packed_batch(STEP), 10**6)
    objective(stage(micro, LOAD).sums_J, stage.counts(micro).float(), stage.weights()).backward()
    found = {name: p.grad for name, p in stage.model.named_parameters()}
    assert found.keys() == wanted.gradients.keys()
    for name, gradient in found.items():
        assert gradient is not None, name
        assert wanted.gradients[name].abs().max().item() > 0, name
        assert relative(gradient, wanted.gradients[name]) < 2e-5, name


def test_no_two_terms_could_be_exchanged_unseen() -> None:
    wanted = expected("beta")
    means = [total.item() / count for total, count in zip(wanted.sums, wanted.counts, strict=True)]
    assert len({round(mean, 1) for mean in means}) == 4
    assert min(wanted.hits[:2]) > 0
    assert wanted.hits[0] != wanted.hits[1]


def test_a_step_of_the_engine_takes_the_objective_of_the_formulas() -> None:
    """From the gradient norm alone: four weights, four counts, over two micro-batches of one global batch."""
    config, wanted = config_of("beta"), expected("beta")
    stage = stage_of("beta")
    engine = PlainEngine(stage, config, torch.device("cpu"))
    engine.routing.load_ME = LOAD
    micros: list[MicroBatch] = [stage.prepare(part, 10**6) for part in packed_batch(STEP).micro_batches(ROWS // 2)]
    result: StepResult = engine.train_step(micros, {"all": 1e-3})
    norm = torch.stack([gradient.norm() for gradient in wanted.gradients.values()]).norm()
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)
    assert result.totals.sums_J.tolist() == pytest.approx([total.item() for total in wanted.sums], rel=1e-5)
    assert result.totals.counts_J.tolist() == wanted.counts
    assert result.totals.hits_J.tolist() == wanted.hits
