"""Evaluation on held-out rows: per source, with the true, a zero and a foreign memory.

The joint loss is cheated by design: the decoder reads the very document it predicts. Only the three together say what
was learnt: true memory (the task as trained, without noise), zero memory (a language model on its own), and another
row's memory (how much a wrong memory harms).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import Batch, eval_reader
from rxt_dist.data.masking import IGNORED_LABEL
from rxt_dist.data.rows import PAD_ID
from rxt_dist.engine.interface import Engine, TermTotals
from rxt_dist.stages.joint import JointStage, MemoryKind

MEMORIES: tuple[MemoryKind, ...] = ("true", "zero", "foreign")


@dataclass(frozen=True)
class Evaluation:
    """One source read with one memory. Losses in nats per target; accuracies as shares of targets."""

    source: str
    language: str
    memory: MemoryKind
    rows: int
    ar_loss: float
    ar_accuracy: float
    mlm_loss: float
    mlm_accuracy: float


def sources_without_evaluation(dataset: TokenDataset) -> list[str]:
    """Names of the sources whose held-out rows are too few: a foreign memory needs a second row."""
    return [source.name for index, source in enumerate(dataset.sources) if dataset.rows(index, "eval") < 2]


def evaluate(
    engine: Engine, stage: JointStage, dataset: TokenDataset, rows_per_source: int, micro_rows: int
) -> list[Evaluation]:
    """Evaluate every source that has at least two held-out rows; all ranks together.

    Rows are taken in pairs, and the foreign memory of a row is its partner's: the figures do not depend on how many
    ranks there are or how many rows they compute at once.
    """
    results = []
    passed_over = sources_without_evaluation(dataset)
    for index, source in enumerate(dataset.sources):
        if source.name in passed_over:
            continue
        pairs = max(2, min(rows_per_source, dataset.rows(index, "eval"))) // 2
        batches = _rank_batches(engine, dataset, source.name, pairs, max(1, micro_rows // 2))
        micros = [stage.prepare(batch, None) for batch in batches]
        for memory in MEMORIES:
            totals = engine.evaluate([micro.with_memory(memory) for micro in micros])
            results.append(Evaluation(source.name, source.language, memory, 2 * pairs, *_figures(stage, totals)))
    return results


def _rank_batches(engine: Engine, dataset: TokenDataset, source: str, pairs: int, micro_pairs: int) -> list[Batch]:
    """This rank's micro-batches: equally many and equally large on every rank, the last of them filled up with blanks.

    Ranks must compute equally often, because they exchange tokens and weights in every forward pass.
    """
    share = -(-pairs // engine.ranks.world_size)
    first = engine.ranks.rank * share
    reader = eval_reader(dataset, source)
    batches = []
    for start in range(first, first + share, micro_pairs):
        wanted = np.arange(2 * start, 2 * min(start + micro_pairs, first + share), dtype=np.int64)
        real = int((wanted < 2 * pairs).sum())
        # Kept in host memory: the engine takes one micro-batch at a time.
        read = reader.read(np.where(wanted < 2 * pairs, wanted, 0)).to(torch.device("cpu"))
        batches.append(_blank(read, real))
    return batches


def _blank(batch: Batch, real: int) -> Batch:
    """The batch with only its first `real` rows; the others become padding, which counts for nothing."""
    tokens_BT, labels_BT, segments_BT = batch.tokens_BT.clone(), batch.labels_BT.clone(), batch.segments_BT.clone()
    tokens_BT[real:] = PAD_ID
    labels_BT[real:] = IGNORED_LABEL
    segments_BT[real:] = -1
    return replace(batch, tokens_BT=tokens_BT, labels_BT=labels_BT, segments_BT=segments_BT)


def _figures(stage: JointStage, totals: TermTotals) -> tuple[float, float, float, float]:
    """(AR loss, AR accuracy, MLM loss, MLM accuracy)."""
    figures = []
    for term in ("ar", "mlm"):
        at = stage.terms.index(term)
        count = max(1.0, totals.counts_T[at].item())
        figures += [totals.sums_T[at].item() / count, totals.hits_T[at].item() / count]
    return figures[0], figures[1], figures[2], figures[3]
