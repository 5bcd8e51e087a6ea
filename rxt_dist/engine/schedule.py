"""Learning rate and global batch as pure functions of what has been trained."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

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


def batch_rows(train: TrainConfig, seq_len: int) -> Callable[[int], int]:
    """Rows of the global batch that begins at a data position (in rows); Megatron's calculator where it ramps up.

    The function may be called from several threads, as the loop and its prefetching do.
    """
    full = train.global_batch_tokens // seq_len
    if train.ramp is None:
        return lambda position: full
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    calculator = RampupBatchsizeNumMicroBatchesCalculator(
        global_batch_size=full,
        micro_batch_size=1,
        data_parallel_size=1,
        decrease_batch_size_if_needed=False,
        rank=-1,  # It logs on rank 0 only; our own log line is enough.
        start_global_batch_size=train.ramp.start_tokens // seq_len,
        batch_size_increment=train.ramp.increment_tokens // seq_len,
        ramup_samples=train.ramp.over_tokens // seq_len,
    )

    lock = threading.Lock()

    def rows(position: int) -> int:
        # The calculator keeps its answer in itself: asked by two threads at once it would mix them up.
        with lock:
            calculator.update(position, consistency_check=False)
            return int(calculator.current_global_batch_size)

    return rows
