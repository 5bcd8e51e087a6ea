"""When a run saves, and what it writes into a checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict

from rxt_dist.checkpoint.state import save_state
from rxt_dist.data.sampler import DataState
from rxt_dist.train.resume import Position
from rxt_dist.train.training import Training


class Saver:
    """Commits checkpoints of one life of a run, each step at most once.

    Args:
        position: where this life began, which is committed already or holds nothing to lose.
    """

    def __init__(self, training: Training, position: Position) -> None:
        self.training = training
        self._saved = position.step

    def due(self, before: Position, after: Position) -> bool:
        """Whether a checkpoint is due at the boundary of a step."""
        return self.training.crosses(before, after, self.training.config.checkpoint.every_tokens)

    def save(self, position: Position) -> None:
        """Commit a checkpoint of `position`, if that has not been done."""
        if position.step == self._saved:
            return
        training, started = self.training, time.monotonic()
        data = DataState.at(training.data.order, training.data.digests, position.row, position.tokens_seen)
        tokens = training.tokens(position)
        meta = {"tokens": tokens, "position": asdict(position), "data": data.to_dict(), **training.identity}
        path = save_state(training.engine, training.frozen, training.store, position.step, meta)
        size = sum(file.stat().st_size for file in path.iterdir())
        seconds = time.monotonic() - started
        training.reporter.event("save", step=position.step, path=path.name, bytes=size, seconds=round(seconds, 3))
        self._saved = position.step
