"""Learning rate, global batch and steps as pure functions of what has been trained.

Whoever speaks of steps (the loop, `data show --step`, `plan`) takes them from `steps`.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from rxt_dist.config.run import ScheduleConfig, TrainConfig


def learning_rate(schedule: ScheduleConfig, peak: float, total_tokens: int, tokens: int) -> float:
    """Learning rate of the step that ends at `tokens` trained tokens (so that the first step of a warm-up moves).

    Linear warm-up to the peak at `warmup_tokens`; then a half cosine to min_ratio * peak (cosine), or the peak until
    the last `decay_tokens` and a line to min_ratio * peak (wsd). After `total_tokens` it stays at the end value.
    """
    if tokens < schedule.warmup_tokens:
        return peak * tokens / schedule.warmup_tokens
    floor = peak * schedule.min_ratio
    length = total_tokens - schedule.warmup_tokens if schedule.kind == "cosine" else schedule.decay_tokens
    done = tokens - (total_tokens - length)
    if done <= 0:
        return peak
    progress = min(1.0, done / max(1, length))
    if schedule.kind == "cosine":
        return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak + (floor - peak) * progress


@dataclass(frozen=True)
class Step:
    """One global batch: `rows` rows from the data position `first`; `last`: none follows."""

    first: int
    rows: int
    last: bool

    @property
    def end(self) -> int:
        """The data position after it."""
        return self.first + self.rows


def steps(train: TrainConfig, row_tokens: int, first_row: int = 0) -> Iterator[Step]:
    """The steps of a run from a data position (in rows) on.

    A batch that would go beyond `train.total_tokens` is not begun. The size of a batch that ramps up is Megatron's.

    Args:
        row_tokens: what a row counts for.
    """
    rows_at = _RampedRows(train, row_tokens) if train.ramp else _FullRows(train, row_tokens)
    last_row = train.total_tokens // row_tokens
    rows = rows_at(first_row)
    while first_row + rows <= last_row:
        end = first_row + rows
        following = rows_at(end)
        yield Step(first_row, rows, last=end + following > last_row)
        first_row, rows = end, following


def count_steps(train: TrainConfig, row_tokens: int) -> int:
    """Number of all steps of a run."""
    if train.ramp is None:
        return train.total_tokens // row_tokens // (train.global_batch_tokens // row_tokens)
    rows_at, last_row, position, count = _RampedRows(train, row_tokens), train.total_tokens // row_tokens, 0, 0
    while position + (rows := rows_at(position)) <= last_row:
        alike = _batches_alike(rows_at, position, rows, (last_row - position) // rows)
        position += alike * rows
        count += alike
    return count


def _batches_alike(rows_at: _RampedRows, position: int, rows: int, most: int) -> int:
    """How many batches from a position on have `rows` rows, `most` at most; batches never shrink."""
    return 1 + bisect_left(range(1, most), True, key=lambda before: rows_at(position + before * rows) != rows)


class _FullRows:
    def __init__(self, train: TrainConfig, row_tokens: int) -> None:
        self._rows = train.global_batch_tokens // row_tokens

    def __call__(self, position: int) -> int:
        return self._rows


class _RampedRows:
    """Rows of the batch at a position, by Megatron's calculator; it keeps its answer, so each iteration has its own."""

    def __init__(self, train: TrainConfig, row_tokens: int) -> None:
        from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

        assert train.ramp is not None
        self._calculator = RampupBatchsizeNumMicroBatchesCalculator(
            global_batch_size=train.global_batch_tokens // row_tokens,
            micro_batch_size=1,
            data_parallel_size=1,
            decrease_batch_size_if_needed=False,
            rank=-1,  # It logs on rank 0 only; our own log line is enough.
            start_global_batch_size=train.ramp.start_tokens // row_tokens,
            batch_size_increment=train.ramp.increment_tokens // row_tokens,
            ramup_samples=train.ramp.over_tokens // row_tokens,
        )

    def __call__(self, position: int) -> int:
        self._calculator.update(position, consistency_check=False)
        return int(self._calculator.current_global_batch_size)
