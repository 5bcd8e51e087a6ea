"""The training loop: load, step, log, evaluate, save, stop. It reads straight down.

All state that decides what happens next is a `Position`: integers, equal on all ranks. Every decision that concerns all
ranks (stop, give up) is an explicit reduction.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rxt_dist.checkpoint.state import save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.run import RunConfig
from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import BatchReader, prefetch
from rxt_dist.data.sampler import DataState, GlobalOrder
from rxt_dist.engine.interface import Engine
from rxt_dist.engine.schedule import batch_rows, learning_rate
from rxt_dist.errors import DivergedError, ExitCode
from rxt_dist.stages.joint import JointStage
from rxt_dist.train.evaluate import Evaluation, evaluate, sources_without_evaluation
from rxt_dist.train.observe import Interval
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.voice import Voice


@dataclass(frozen=True)
class Position:
    """How far training is: steps taken, updates applied, rows delivered, tokens that were not padding."""

    step: int = 0
    applied: int = 0
    row: int = 0
    tokens_seen: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Training:
    """Everything the loop works with."""

    config: RunConfig
    engine: Engine
    stage: JointStage
    dataset: TokenDataset
    order: GlobalOrder
    store: CheckpointStore
    stop: StopRequest
    voice: Voice
    identity: dict[str, Any]

    @property
    def seq_len(self) -> int:
        """Tokens of a row."""
        return self.dataset.seq_len


def run_loop(training: Training, position: Position) -> ExitCode:
    """Train from `position` to the end of the budget, or until asked to stop.

    Raises:
        DivergedError: after too many steps in a row whose update had to be skipped.
    """
    config, engine, stage, voice = training.config, training.engine, training.stage, training.voice
    rows_at = batch_rows(config.train, training.seq_len)
    last_row = config.train.total_tokens // training.seq_len
    reader = BatchReader(training.dataset, training.order, pinned=engine.device.type == "cuda")
    interval = Interval(config, stage.terms, engine.ranks)
    saved = position.step
    with prefetch(reader, _rank_positions(position.row, last_row, rows_at, engine)) as batches:
        for read in batches:
            batch = read.to(engine.device)
            tokens = position.row * training.seq_len
            end = tokens + rows_at(position.row) * training.seq_len
            lr = learning_rate(config.schedule, config.optimizer.lr, config.train.total_tokens, end)
            micros = [stage.prepare(part, tokens) for part in batch.micro_batches(config.train.micro_batch_rows)]
            result = engine.train_step(micros, lr)
            before, position = position, _advance(position, rows_at(position.row), result.applied, result)
            interval.add(result, batch)
            if not result.applied:
                voice.event("skip", step=position.step, reason=result.reason, in_a_row=position.skipped_in_a_row)
            if position.skipped_in_a_row >= config.train.max_skipped_steps:
                raise DivergedError(
                    f"{position.skipped_in_a_row} steps in a row had a {result.reason} (the last is step "
                    f"{position.step}). Nothing was updated since step {position.step - position.skipped_in_a_row}; "
                    "start again with a lower optimizer.lr or optimizer.clip: the run goes on from its last checkpoint."
                )
            done = position.row + rows_at(position.row) > last_row
            if done or position.step % config.log.every_steps == 0 or position.step == 1:
                voice.line(position, interval.figures() | _levels(micros[0], lr), position.row * training.seq_len)
            paused = time.monotonic()
            if _crosses(before, position, config.eval.every_tokens, training) and not done:
                run_evaluation(training, position)
            reason = training.stop.reason
            stopping = engine.ranks.any(reason is not None)
            if done or stopping or _crosses(before, position, config.checkpoint.every_tokens, training):
                save(training, position)
                saved = position.step
            interval.exclude(time.monotonic() - paused)
            if stopping and not done:
                voice.event("stop", step=position.step, reason=reason or "another rank was asked to stop")
                return ExitCode.PREEMPTED
    if saved != position.step:
        save(training, position)
    run_evaluation(training, position)
    voice.event("finish", step=position.step, tokens=position.row * training.seq_len)
    return ExitCode.DONE


def save(training: Training, position: Position) -> None:
    """Commit a checkpoint of `position`."""
    started = time.monotonic()
    state = DataState.at(training.order, training.dataset.digest, position.row, position.tokens_seen)
    tokens = position.row * training.seq_len
    meta = {"tokens": tokens, "position": asdict(position), "data": state.to_dict(), **training.identity}
    path = save_state(training.engine, training.store, position.step, meta)
    size = sum(file.stat().st_size for file in path.iterdir())
    seconds = time.monotonic() - started
    training.voice.event("save", step=position.step, path=path.name, bytes=size, seconds=round(seconds, 3))


def run_evaluation(training: Training, position: Position) -> list[Evaluation]:
    """Evaluate and report."""
    config = training.config
    for source in sources_without_evaluation(training.dataset):
        training.voice.message(f"source '{source}' has fewer than two held-out rows and is not evaluated")
    results = evaluate(
        training.engine, training.stage, training.dataset, config.eval.rows_per_source, config.train.micro_batch_rows
    )
    training.voice.evaluation(position.step, position.row * training.seq_len, results)
    return results


def _rank_positions(
    row: int, last_row: int, rows_at: Callable[[int], int], engine: Engine
) -> Iterator[np.ndarray[Any, np.dtype[np.int64]]]:
    """This rank's contiguous slice of every global batch from `row` on; a batch beyond the budget is not begun."""
    world, rank = engine.ranks.world_size, engine.ranks.rank
    while row + (rows := rows_at(row)) <= last_row:
        share = rows // world
        yield np.arange(row + rank * share, row + (rank + 1) * share, dtype=np.int64)
        row += rows


def _advance(position: Position, rows: int, applied: bool, result: Any) -> Position:
    return replace(
        position,
        step=position.step + 1,
        applied=position.applied + applied,
        row=position.row + rows,
        tokens_seen=position.tokens_seen + int(result.totals.counts_T[-1].item()),
        skipped_in_a_row=0 if applied else position.skipped_in_a_row + 1,
    )


def _crosses(before: Position, after: Position, every_tokens: int, training: Training) -> bool:
    """Whether a multiple of `every_tokens` lies between two positions; 0 means never."""
    if not every_tokens:
        return False
    return before.row * training.seq_len // every_tokens != after.row * training.seq_len // every_tokens


def _levels(micro: Any, lr: float) -> dict[str, float | list[float]]:
    return {"lr": lr, "noise": micro.noise, "masking": micro.masking}
