"""The smallest system with every part of RxT-Beta, and packed batches for it. Imported by tests and by gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rxt_dist.config.load import load_model
from rxt_dist.config.model import ModelConfig
from rxt_dist.config.run import OptimizerConfig, ParallelConfig, RunConfig, TrainConfig
from rxt_dist.config.stages import DEFAULT_STAGE, STAGES
from rxt_dist.data.dialogue_source import TurnBatch
from rxt_dist.data.interactions import ANSWER_ID, QUERY_ID, THINK_ID
from rxt_dist.data.loader import TokenBatch, token_batch
from rxt_dist.data.rows import BOS_ID, EOS_ID, SPECIAL_COUNT
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import Stage, build_network, stage_class

DEMO = Path(__file__).parents[1] / "configs/model/demo.yaml"
ROWS, TOKENS = 8, 32
# Document lengths of eight rows; what is missing to 32 is padding, from none to nearly all of a row.
LENGTHS = ((20, 9), (32,), (5,), (1, 30, 1), (11, 11), (3, 4, 5, 6), (31,), (16, 16))


TRAIN = {
    "total_tokens": 10**6,
    "global_batch_tokens": ROWS * TOKENS,
    "precision": "float32",
    "logit_chunk_tokens": 16,
}


def model_config(*overrides: str) -> ModelConfig:
    """The demo model's structure at width 32: a dense, two stateful, a stateless MoE layer; 8 experts, 2 active."""
    small = [
        "vocab_size=128",
        "dim=32",
        "heads=4",
        "layers=2",
        "seq_len=32",
        "stm_slots=6",
        "decoder.self_attention.query_heads=2",
        "decoder.cross_attention.query_heads=2",
        "decoder.dense_hidden=48",
        "decoder.moe.experts=8",
        "decoder.moe.hidden=24",
        "decoder.moe.shared_hidden=24",
        "encoder.attention.query_heads=2",
        "encoder.attention.kv_heads=2",
        "encoder.hidden=48",
        "memory_attention.attention.query_heads=2",
        "memory_attention.attention.kv_heads=2",
    ]
    return load_model(DEMO, [*small, *overrides])


def run_config(*, model: ModelConfig | None = None, stage: Any = DEFAULT_STAGE, **changes: Any) -> RunConfig:
    """A run of the tiny model; `changes` are fields of its train, optimizer, parallel and stage sections.

    stage: a kind, or a configuration class.
    """

    def section(kind: Any, **defaults: Any) -> Any:
        own = {name: changes.pop(name) for name in list(changes) if name in kind.model_fields}
        return kind(**(defaults | own))

    parts = {
        "parallel": section(ParallelConfig),
        "optimizer": section(OptimizerConfig),
        "train": section(TrainConfig, **TRAIN),
        "stage": section(STAGES[stage].config if isinstance(stage, str) else stage),
    }
    assert not changes, f"no section has {list(changes)}"
    return RunConfig.model_construct(model=model or model_config(), seed=0, **parts)


def make_stage(config: RunConfig) -> Stage:
    """A freshly initialised stage of the run."""
    model = build_network(config)
    initialise(model, config.seed)
    return stage_class(config)(model, config)


def batch_for(config: RunConfig, step: int = 0) -> Any:
    """Batch number `step` of what the run's stage reads."""
    return BATCHES[config.stage.kind](step)


def packed_batch(step: int = 0, lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> TokenBatch:
    """Batch number `step`: rows of packed documents with random ids, and padding."""
    rows = len(lengths)
    tokens = np.random.default_rng(step).integers(SPECIAL_COUNT, 128, (rows, TOKENS)).astype(np.uint16)
    for row, documents in enumerate(lengths):
        tokens[row, sum(documents) :] = 0
    return token_batch(
        torch.from_numpy(tokens.view(np.int16)),
        np.array([len(documents) for documents in lengths]),
        np.array([length for documents in lengths for length in documents]),
        np.zeros(rows, np.int64),
        np.arange(rows, dtype=np.int64) + step * rows,
    )


# Lengths of the interactions of eight rows.
INTERACTIONS = ((20, 9), (32,), (6,), (8, 24), (11, 11), (7, 6, 5, 6), (31,), (16, 16))


def interaction_batch(step: int = 0) -> TokenBatch:
    """Batch number `step`: rows of single interactions, of which every other one thinks before it answers."""
    batch = packed_batch(step, INTERACTIONS)
    tokens_N, bounds = batch.tokens_BT.view(-1), batch.cu_seqlens.tolist()
    for number, (start, end) in enumerate(pairwise(bounds)):
        if batch.numbers_I[number] < 0:
            continue
        asked = start + (end - start) // 3 + 1
        tokens_N[start : start + 2] = torch.tensor([BOS_ID, QUERY_ID], dtype=torch.int16)
        tokens_N[end - 1] = EOS_ID
        tokens_N[asked] = ANSWER_ID
        if number % 2 and end - asked > 4:
            tokens_N[asked], tokens_N[asked + 2] = THINK_ID, ANSWER_ID
    return batch


# Lengths of the turns of eight dialogues, of one to three turns; a turn is at most TOKENS long.
DIALOGUES = ((20, 9, 12), (32,), (6, 7), (8, 24, 5), (11, 11), (7,), (31, 8, 9), (16, 16))


def dialogue_batch(step: int = 0) -> TurnBatch:
    """Batch number `step`: dialogues of unequal numbers of turns, every third time of one; every turn is an
    interaction."""
    turns = max(map(len, DIALOGUES))
    random = np.random.default_rng(step)
    tokens = np.zeros((len(DIALOGUES), turns, TOKENS), dtype=np.int64)
    lengths = np.zeros((len(DIALOGUES), turns), dtype=np.int64)
    for b, dialogue in enumerate(DIALOGUES):
        for u, length in enumerate(dialogue):
            text = random.integers(SPECIAL_COUNT, 128, length)
            text[[0, 1, length // 2 + 1, length - 1]] = BOS_ID, QUERY_ID, ANSWER_ID, EOS_ID
            tokens[b, u, :length], lengths[b, u] = text, length
    if step % 3 == 1:
        # No dialogue has a second turn.
        turns = 1
        tokens, lengths = tokens[:, :1], lengths[:, :1]
    samples = np.arange(len(DIALOGUES), dtype=np.int64) + step * len(DIALOGUES)
    recalls = np.zeros((*lengths.shape, 3), dtype=np.int64)
    # What the last turns of two dialogues recall, told one turn and two turns before.
    if turns > 2:
        recalls[3, 2], recalls[6, 2] = (1, 4, 5), (2, 6, 8)
    return TurnBatch(*(torch.from_numpy(array) for array in (tokens, lengths, samples, recalls)))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    worst = (actual.double() - expected.double()).abs().max().item()
    return worst / max(expected.double().abs().max().item(), 1e-30)


# What each stage reads.
BATCHES: dict[str, Callable[[int], Any]] = {
    "joint": packed_batch,
    "mlm": packed_batch,
    "decoder": packed_batch,
    "sft": interaction_batch,
    "decoder-sft": interaction_batch,
    "memory": dialogue_batch,
    "smat": dialogue_batch,
    "lm": packed_batch,
    "frozen-experts": packed_batch,
    "encoder": packed_batch,
}
