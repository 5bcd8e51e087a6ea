"""The training loop: load, step, log, evaluate, save, stop. It reads straight down.

All state that decides what happens next is a `Position`: integers, equal on all ranks. Every decision that concerns all
ranks (stop, give up) is an explicit reduction.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from rxt_dist.config.run import RunConfig
from rxt_dist.config.schedules import Step, learning_rate, steps
from rxt_dist.data.loader import Prefetcher, prefetch
from rxt_dist.engine.interface import StepResult
from rxt_dist.errors import DivergedError, ExitCode
from rxt_dist.stages.base import Batch
from rxt_dist.train.evaluate import Evaluation, evaluate, sources_without_evaluation
from rxt_dist.train.interval import Interval
from rxt_dist.train.resume import Position
from rxt_dist.train.saving import Saver
from rxt_dist.train.training import Training


def run_loop(training: Training, position: Position) -> ExitCode:
    """Train from `position` to the end of the budget, or until asked to stop.

    Raises:
        DivergedError: after too many updates in a row that had to be skipped.
    """
    config, engine, reporter = training.config, training.engine, training.reporter
    interval = Interval(config, training.stage, engine.ranks.world_size)
    saver = Saver(training, position)
    with _batches(training, position.row) as batches:
        for step, batch in batches:
            before, position = position, replace(position, step=position.step + 1, row=step.end)
            interval.add_step()
            for result in _updates(training, step, batch):
                position = _advance(position, result)
                interval.add(result)
                if not result.applied:
                    reporter.event("skip", step=position.step, reason=result.reason, in_a_row=position.skipped_in_a_row)
                _require_progress(config, position, result)
            if step.last or position.step % config.log.every_steps == 0 or position.step == 1:
                trained = training.tokens(before)
                lr = _learning_rate(training, step)
                figures = interval.figures() | {"lr": lr} | training.stage.levels(trained)
                reporter.line(position, figures, training.tokens(position))
            paused = time.monotonic()
            if training.profile is not None:
                training.profile.after_step(position.step)
            if training.crosses(before, position, config.eval.every_tokens) and not step.last:
                run_evaluation(training, position)
            stopping, reason = training.asked_to_stop()
            if step.last or stopping or saver.due(before, position):
                saver.save(position)
            interval.exclude(time.monotonic() - paused)
            if stopping and not step.last:
                reporter.event("stop", step=position.step, reason=reason)
                return stopping
    saver.save(position)
    run_evaluation(training, position)
    reporter.event("finish", step=position.step, tokens=training.tokens(position))
    return ExitCode.DONE


def run_evaluation(training: Training, position: Position) -> list[Evaluation]:
    """Evaluate and report."""
    config, stage = training.config, training.stage
    for source in sources_without_evaluation(training.data, stage):
        training.reporter.message(f"source '{source}' has too few held-out rows and is not evaluated")
    rows, micro_rows = config.eval.rows_per_source, config.train.micro_batch_rows
    began = time.monotonic()
    results = evaluate(training.engine, stage, training.data, rows, micro_rows)
    seconds = time.monotonic() - began
    training.reporter.evaluation(position.step, training.tokens(position), results, seconds)
    return results


def _batches(training: Training, row: int) -> Prefetcher[Step, tuple[Step, Batch]]:
    """Every step from a data position on, with this rank's contiguous slice of its global batch, read ahead."""
    world, rank = training.engine.ranks.world_size, training.engine.ranks.rank

    def read(step: Step) -> tuple[Step, Batch]:
        share = step.rows // world
        positions = np.arange(step.first, step.end, dtype=np.int64)
        return step, training.data.read(positions, slice(rank * share, (rank + 1) * share))

    return prefetch(read, steps(training.config.train, training.data.row_tokens, row))


def _updates(training: Training, step: Step, batch: Batch) -> Iterator[StepResult]:
    """Make the updates that the stage makes of a batch."""
    engine, stage = training.engine, training.stage
    trained = step.first * training.data.row_tokens
    lr = _learning_rate(training, step)
    rates = {group: lr * factor for group, factor in stage.rates(trained).items()}
    parts = batch.micro_batches(training.config.train.micro_batch_rows)
    for micros in stage.updates(parts, trained, engine.reading):
        yield engine.train_step(micros, rates)


def _learning_rate(training: Training, step: Step) -> float:
    config = training.config
    end = step.end * training.data.row_tokens
    return learning_rate(config.schedule, config.optimizer.lr, config.train.total_tokens, end)


def _advance(position: Position, result: StepResult) -> Position:
    return replace(
        position,
        applied=position.applied + result.applied,
        tokens_seen=position.tokens_seen + result.totals.tokens,
        skipped_in_a_row=0 if result.applied else position.skipped_in_a_row + 1,
    )


def _require_progress(config: RunConfig, position: Position, result: StepResult) -> None:
    if position.skipped_in_a_row >= config.train.max_skipped_steps:
        raise DivergedError(
            f"{position.skipped_in_a_row} steps in a row had a {result.reason} (the last is step "
            f"{position.step}). Nothing was updated since step {position.step - position.skipped_in_a_row}; "
            "start again with a lower optimizer.lr or optimizer.clip: the run goes on from its last checkpoint."
        )
