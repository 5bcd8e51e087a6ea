"""Evaluation on held-out rows: per source, in every view that the stage has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from rxt_dist.engine.interface import Engine, TermTotals
from rxt_dist.stages.base import Batch, DataSource, MicroBatch, Stage


@dataclass(frozen=True)
class Evaluation:
    """One source seen in one view.

    losses: per target (of predictions in nats), of each term with a title that has targets; accuracies: shares of its
        targets that were hit, of those that predict something.
    """

    source: str
    language: str
    view: str
    rows: int
    losses: Mapping[str, float]
    accuracies: Mapping[str, float]


def sources_without_evaluation(data: DataSource, stage: Stage) -> list[str]:
    """Names of the sources whose held-out rows are too few for one group of rows that belong together."""
    return [source.name for index, source in enumerate(data.sources) if data.held_out(index) < stage.rows_together]


def evaluate(engine: Engine, stage: Stage, data: DataSource, rows_per_source: int, micro_rows: int) -> list[Evaluation]:
    """Evaluate every source that has enough held-out rows; all ranks together.

    Rows are taken in the stage's groups: the figures do not depend on how many ranks there are or how many rows they
    compute at once. Of a stage that predicts nothing there is nothing to say, and nothing is read.
    """
    results: list[Evaluation] = []
    if not any(term.title for term in stage.terms):
        return results
    passed_over = sources_without_evaluation(data, stage)
    group = stage.rows_together
    for index, source in enumerate(data.sources):
        if source.name in passed_over:
            continue
        groups = max(group, min(rows_per_source, data.held_out(index))) // group
        batches = _rank_batches(engine, data, index, groups, group, max(1, micro_rows // group))
        views = _views(stage, batches)
        for view in views[0]:
            totals = engine.evaluate([micro[view] for micro in views])
            results.append(Evaluation(source.name, source.language, view, group * groups, *_figures(stage, totals)))
    return results


def evaluate_group(engine: Engine, stage: Stage, data: DataSource, source: int) -> float:
    """The mean of all evaluated losses over the first group of a source's held-out rows, in the stage's first view; all
    ranks together."""
    group = stage.rows_together
    views = _views(stage, _rank_batches(engine, data, source, 1, group, 1))
    first = next(iter(views[0]))
    losses, _ = _figures(stage, engine.evaluate([micro[first] for micro in views]))
    return fmean(losses.values())


def _views(stage: Stage, batches: Sequence[Batch]) -> list[Mapping[str, MicroBatch]]:
    """Each micro-batch in every view; kept in host memory, as the engine takes one at a time."""
    return [stage.views(stage.prepare(batch, None)) for batch in batches]


def _rank_batches(
    engine: Engine, data: DataSource, source: int, groups: int, group: int, micro_groups: int
) -> Sequence[Batch]:
    """This rank's micro-batches: equally many and equally large on every rank, the last of them filled up with blanks.

    Ranks must compute equally often, because they exchange tokens and weights in every forward pass.
    """
    world, rank = engine.ranks.world_size, engine.ranks.rank
    share = -(-groups // world)
    rows = np.arange(share * world * group, dtype=np.int64)
    rows[groups * group :] = -1
    starts = range(rank * share, (rank + 1) * share, micro_groups)
    ends = [min(start + micro_groups, (rank + 1) * share) for start in starts]
    parts = [slice(start * group, end * group) for start, end in zip(starts, ends, strict=True)]
    return [data.read_held_out(source, rows, part) for part in parts]


def _figures(stage: Stage, totals: TermTotals) -> tuple[dict[str, float], dict[str, float]]:
    """(losses, accuracies) of the terms that are evaluated and that count something."""
    losses, accuracies = {}, {}
    for at, term in enumerate(stage.terms):
        count = totals.counts_J[at].item()
        if term.title and count:
            losses[term.name] = totals.sums_J[at].item() / count
            if term.predicts:
                accuracies[term.name] = totals.hits_J[at].item() / count
    return losses, accuracies
