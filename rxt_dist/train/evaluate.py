"""Evaluation on held-out rows: per source, with the true, a zero and a foreign memory.

The joint loss is cheated by design: the decoder reads the very document it predicts. Only the three together say what
was learnt: true memory (the task as trained, without noise), zero memory (a language model on its own), and another
row's memory (how much a wrong memory harms).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import Batch, eval_reader
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
    """Evaluate every source that has at least two held-out rows; all ranks together."""
    results = []
    passed_over = sources_without_evaluation(dataset)
    for index, source in enumerate(dataset.sources):
        if source.name in passed_over:
            continue
        rows = max(2, min(rows_per_source, dataset.rows(index, "eval")))
        used, batches = _rank_batches(engine, dataset, source.name, rows, micro_rows)
        micros = [stage.prepare(batch, None) for batch in batches]
        for memory in MEMORIES:
            totals = engine.evaluate([micro.with_memory(memory) for micro in micros])
            results.append(Evaluation(source.name, source.language, memory, used, *_figures(stage, totals)))
    return results


def _rank_batches(
    engine: Engine, dataset: TokenDataset, source: str, rows: int, micro_rows: int
) -> tuple[int, list[Batch]]:
    """(rows used, this rank's micro-batches): equally many on every rank, each of at least two rows.

    With fewer than two rows a rank, every rank reads all of them: sums and counts grow alike, so no figure changes.
    """
    world, rank = engine.ranks.world_size, engine.ranks.rank
    share = rows // world
    positions = np.arange(rows) if share < 2 else np.arange(rank * share, (rank + 1) * share)
    cuts = list(range(0, len(positions), max(2, micro_rows)))
    if len(cuts) > 1 and len(positions) - cuts[-1] < 2:
        cuts.pop()
    reader = eval_reader(dataset, source)
    batches = [reader.read(part.astype(np.int64)) for part in np.split(positions, cuts[1:])]
    return rows if share < 2 else share * world, batches


def _figures(stage: JointStage, totals: TermTotals) -> tuple[float, float, float, float]:
    """(AR loss, AR accuracy, MLM loss, MLM accuracy)."""
    figures = []
    for term in ("ar", "mlm"):
        at = stage.terms.index(term)
        count = max(1.0, totals.counts_T[at].item())
        figures += [totals.sums_T[at].item() / count, totals.hits_T[at].item() / count]
    return figures[0], figures[1], figures[2], figures[3]
