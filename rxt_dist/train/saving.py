"""When a run saves, what it writes into a checkpoint, and what it does when that fails."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from statistics import fmean
from types import MappingProxyType
from typing import Any

from rxt_dist.checkpoint.background import BackgroundSaves
from rxt_dist.checkpoint.state import save_state
from rxt_dist.data.sampler import DataState
from rxt_dist.errors import CheckpointError, DiskError, SupersededError, UserError
from rxt_dist.train.evaluate import Evaluation
from rxt_dist.train.probe import measure_probe
from rxt_dist.train.resume import Position
from rxt_dist.train.training import Training

# A failed save is tried again at a step boundary after this, or when the next one is due, whichever comes first.
_RETRY_SECONDS = 60.0
# A save that must not fail is tried again after these.
_PAUSES = (1.0, 5.0)
# How long the end of a life by an error waits for a checkpoint that is nearly there.
_GRACE_SECONDS = 10.0


class Saver:
    """Commits checkpoints of one life of a run, each step at most once. All ranks call its methods together.

    Args:
        position: where this life began, which is committed already or holds nothing to lose.
        evaluation: the last one before, as the checkpoint there says; None: there was none.
    """

    def __init__(self, training: Training, position: Position, evaluation: Mapping[str, Any] | None = None) -> None:
        self.training = training
        self._saved = position.step
        self._background: BackgroundSaves | None = None
        # What is said of the save that is being written, once it is known what became of it.
        self._pending: dict[str, Any] = {}
        self._last = time.monotonic()
        self._retry_at = math.inf
        self._evaluation = evaluation

    def due(self, before: Position, after: Position) -> bool:
        """Whether a checkpoint is due at the boundary of a step: by tokens, by minutes, or again after a failure."""
        config, ranks = self.training.config.checkpoint, self.training.engine.ranks
        self._look()
        if self.training.crosses(before, after, config.every_tokens):
            return True
        if not config.every_minutes and self._background is None:
            return False
        # The clock of rank 0, which alone knows what became of a save.
        now = time.monotonic()
        late = bool(config.every_minutes) and now - self._last >= 60 * config.every_minutes
        return ranks.any(ranks.rank == 0 and (late or now >= self._retry_at))

    def save(
        self,
        position: Position,
        *,
        wait: bool,
        suspect: bool = False,
        further: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Save `position`, if that has not been done.

        Args:
            wait: until it is committed, trying several times; otherwise it is copied and written while training goes
                on to `before_update`, and a failure is an event. A save that is still being written is waited for
                either way.
            suspect: the losses say that something is wrong: neither retention nor a way back counts it.
            further: what else the next life needs, by names of its own.

        Raises:
            DiskError, CheckpointError: with `wait`, when it cannot be committed.
            SupersededError: with `wait`, when the run is in another life.
        """
        started = time.monotonic()
        self.settle()
        if position.step == self._saved:
            return
        self._last, self._retry_at = started, math.inf
        meta = {**self._meta(position, suspect), **further}
        if wait:
            self._save_now(position, meta)
            return
        if self._background is None:
            training = self.training
            self._background = BackgroundSaves(training.engine, training.frozen, training.store)
        self._background.start(position.step, meta)
        self._saved = position.step
        self._pending = {"started": started, "stall_s": time.monotonic() - started}

    def before_update(self) -> None:
        """Weights and moments change after this: wait for the copy of them that a save is made from."""
        if self._background is None:
            return
        began = time.monotonic()
        self._background.before_update()
        if self._pending:
            self._pending["stall_s"] += time.monotonic() - began

    def settle(self) -> None:
        """Wait for the save that is being written, and learn on all ranks what became of it."""
        if self._background is None or not self._background.running:
            return
        outcome = self._background.wait()
        self._look()
        if self.training.engine.ranks.any(self.training.engine.ranks.rank == 0 and outcome.error is not None):
            self._saved = -1  # Not this step: it may be saved again.

    @contextmanager
    def closing(self) -> Iterator[Saver]:
        """While the block lasts saves may be written in the background; an error that ends it waits a moment for one
        that is nearly committed."""
        try:
            yield self
        finally:
            if self._background is not None:
                self._background.close(_GRACE_SECONDS)
                self._look()

    def note_evaluation(self, step: int, results: Sequence[Evaluation]) -> None:
        """Remember an evaluation for the checkpoints from `step` on: the mean of all losses of the first view."""
        losses = [loss for result in results if result.view == results[0].view for loss in result.losses.values()]
        if losses and math.isfinite(mean := fmean(losses)):
            self._evaluation = {"step": step, "loss": mean}

    def _save_now(self, position: Position, meta: Mapping[str, Any]) -> None:
        training = self.training
        for pause in (*_PAUSES, None):
            started = time.monotonic()
            try:
                path = save_state(training.engine, training.frozen, training.store, position.step, meta)
                break
            except (DiskError, CheckpointError) as error:
                if pause is None:
                    raise
                self._report_failure(position.step, error, pause)
                time.sleep(pause)
        self._saved = position.step
        if training.engine.ranks.rank == 0:
            seconds = time.monotonic() - started
            size = sum(file.stat().st_size for file in path.iterdir())
            self._report(position.step, size, seconds, seconds)

    def _look(self) -> None:
        """Report what became of the save that is being written, if this rank knows it by now."""
        if self._background is None or not self._pending:
            return
        outcome = self._background.outcome
        if outcome is None:
            return
        pending, self._pending = self._pending, {}
        if outcome.error is not None:
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            self._report_failure(outcome.step, outcome.error, _RETRY_SECONDS)
        elif self.training.engine.ranks.rank == 0:
            stall = pending["stall_s"] + self._background.device_wait()
            self._report(outcome.step, outcome.bytes, outcome.seconds, stall)

    def _report(self, step: int, size: int, seconds: float, stall: float) -> None:
        self.training.reporter.event(
            "save",
            step=step,
            path=self.training.store.folder(step).name,
            bytes=size,
            seconds=round(seconds, 3),
            stall_s=round(stall, 3),
            bytes_per_s=round(size / max(seconds, 1e-9)),
        )

    def _report_failure(self, step: int, error: UserError, retry: float) -> None:
        if isinstance(error, SupersededError):  # Then the events are another life's, and this one ends.
            return
        self.training.reporter.event("save_failed", step=step, error=str(error), retry_s=retry)

    def _meta(self, position: Position, suspect: bool) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        training = self.training
        data = DataState.at(training.data.order, training.data.digests, position.row, position.tokens_seen)
        probe = measure_probe(training.engine, training.stage, training.data)
        return {
            "tokens": training.tokens(position),
            "position": asdict(position),
            "data": data.to_dict(),
            # A manifest holds no NaN, and there is nothing to compare with it.
            "probe": probe if probe is not None and math.isfinite(probe["loss"]) else None,
            "evaluation": self._evaluation,
            "suspect": suspect,
            **training.identity,
        }
