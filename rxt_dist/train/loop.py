"""The training loop: load, step, log, evaluate, save, stop, and back where it went wrong. It reads straight down.

All state that decides what happens next is a `Position`, the sums of a log line and what `Health` knows: numbers that
are equal on all ranks and part of every checkpoint. Every decision that concerns all ranks (stop, go back) is an
explicit reduction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from rxt_dist.config.schedules import Step, learning_rate, steps
from rxt_dist.data.loader import Prefetcher, prefetch
from rxt_dist.engine.interface import StepResult
from rxt_dist.errors import ExitCode, ReplicaError
from rxt_dist.stages.base import Batch, MicroBatch
from rxt_dist.train.evaluate import Evaluation, evaluate, sources_without_evaluation
from rxt_dist.train.health import Health, objective_of
from rxt_dist.train.interval import Interval
from rxt_dist.train.pace import Pace
from rxt_dist.train.resume import Position
from rxt_dist.train.rollback import go_back, is_jumped
from rxt_dist.train.saving import Saver
from rxt_dist.train.training import Training


def run_loop(training: Training, position: Position, meta: Mapping[str, Any] | None = None) -> ExitCode:
    """Train from `position` to the end of the budget, or until asked to stop.

    Args:
        meta: of the checkpoint that this life goes on from; without one the run begins.

    Raises:
        DivergedError: it went astray again and again, also from the checkpoints that it went back to.
        ReplicaError: ranks that must hold the same weights do not.
    """
    life = _Life(training, position, meta or {})
    while not isinstance(outcome := life.train(), ExitCode):
        checkpoint, position = go_back(training, life.position, life.health, reason=outcome)
        life = _Life(training, position, checkpoint.meta)
    return outcome


class _Life:
    """Training from one checkpoint on, as long as nothing makes it go back."""

    def __init__(self, training: Training, position: Position, meta: Mapping[str, Any]) -> None:
        config, ranks = training.config, training.engine.ranks
        self.training = training
        self.position = position
        self.interval = Interval(config, training.stage, ranks.world_size, meta.get("interval"))
        self.health = Health(config, meta.get("health"))
        self.saver = Saver(training, position, meta.get("evaluation"))
        self.pace = Pace(ranks)
        self._has_stepped = False
        # A save that was due while updates were skipped is made when they are not.
        self._owed = False

    def train(self) -> ExitCode | str:
        """Train to the end or a stop; or return why the run has to go back."""
        with self.saver.closing():
            outcome = self._train()
            if not isinstance(outcome, ExitCode):
                self._settle()
            return outcome

    def _train(self) -> ExitCode | str:
        training = self.training
        with _batches(training, self.position) as batches:
            while True:
                began = time.monotonic()
                with training.watchdog.phase("data", self.position.step + 1):
                    read = next(batches, None)
                if read is None:
                    break
                step, batch = read
                before = self.position
                self.interval.add_step(time.monotonic() - began)
                with training.watchdog.phase(self._phase("boundary" if batch is None else "step"), before.step + 1):
                    if batch is None:
                        self._pass_over(step)
                    else:
                        self._step(step, batch)
                    verdict = self._verdict(step)
                    stopping, reason, back = training.agreed(bool(verdict))
                if back:
                    return verdict
                self._has_stepped |= batch is not None
                with training.watchdog.phase(self._phase("boundary")):
                    self._log(before, step)
                    with self.interval.paused():
                        self._between_steps(before, step, stopping is not None)
                if stopping and not step.last:
                    # Nothing is saved while updates are skipped, but what was before may still be being written.
                    self._settle()
                    training.reporter.event("stop", step=self.position.step, reason=reason)
                    return stopping
        return self._finish()

    def _phase(self, name: str) -> str:
        """A first step compiles, and what is recorded takes as long as it takes."""
        profile = self.training.profile
        records = profile is not None and profile.active
        if name == "step":
            return "first-step" if records or not self._has_stepped else name
        return "set-up" if records else name

    def _verdict(self, step: Step) -> str:
        """Why the run has to go back; empty while it need not. It does not end on weights that may be spoilt."""
        if step.last and self.health.skipping:
            return self.health.verdict or "the last updates of the run were not finite"
        return self.health.verdict

    def _step(self, step: Step, batch: Batch) -> None:
        """Make the updates of a step."""
        training = self.training
        position = _after(self.position, step)
        self.health.begin(position.step, step.first, _regime(training, step))
        weights = training.stage.weights().tolist()
        for micros, result in _updates(training, step, batch, self._before_update):
            position = _advance(position, result)
            self.interval.add(result)
            loss = objective_of(result.totals, weights)
            threshold = self.health.observe(result.applied, loss)
            streak = self.health.streak
            if not result.applied:
                self._tell_skip(position, result, micros)
            elif streak is not None:
                level = {"loss": _json(loss), "threshold": threshold, "in_a_row": streak.spikes}
                training.reporter.event("spike", step=position.step, **level)
            if self.health.verdict:
                break
        self.position = position

    def _before_update(self) -> None:
        with self.interval.paused():  # A stall, and no part of the step.
            self.saver.before_update()

    def _pass_over(self, step: Step) -> None:
        """A step whose rows made an earlier attempt go astray: it counts, and nothing is learnt from it."""
        self.position = _after(self.position, step)
        self.training.reporter.event("jump", step=self.position.step, rows=[step.first, step.end])

    def _tell_skip(self, position: Position, result: StepResult, micros: Sequence[MicroBatch]) -> None:
        """Say which update was skipped, and where on which rank the first number was that is not finite."""
        training = self.training
        found = training.engine.inspect(micros)
        own = found and {
            "began": [found.micro, found.place],
            "layer": f"{found.layer}{' (gradient)' if found.backward else ''}",
            "samples": list(micros[found.micro].samples),
        }
        places = training.engine.ranks.gather(own)
        met = [(place["began"], rank) for rank, place in enumerate(places) if place]
        # None: not met again. A device's fault, or one of a sum over ranks or of a weight's own gradient.
        rank = min(met)[1] if met else None
        place = {} if rank is None else places[rank]
        where = {"rank": rank, "layer": place.get("layer"), "samples": place.get("samples")}
        in_a_row = position.skipped_in_a_row
        training.reporter.event("skip", step=position.step, reason=result.reason, in_a_row=in_a_row, **where)

    def _log(self, before: Position, step: Step) -> None:
        training, position = self.training, self.position
        due = step.last or position.step % training.config.log.every_steps == 0 or position.step == 1
        if not due or not self.interval.has_update:
            return
        pace = self.pace.exchange(self.interval.waited)
        if pace.is_starved(self.interval.seconds):
            training.reporter.event("starved", step=position.step, seconds=round(pace.waited, 3), rank=pace.waiting)
        for rank, ratio in pace.slow:
            host = training.watchdog.hosts[rank]
            training.reporter.event("slow", step=position.step, rank=rank, host=host, ratio=round(ratio, 2))
        figures = self.interval.figures() | {"data_wait_s": pace.waited, "lr": _learning_rate(training, step)}
        figures |= training.stage.levels(training.tokens(before))
        training.reporter.line(position, figures, training.tokens(position))

    def _between_steps(self, before: Position, step: Step, stopping: bool) -> None:
        """Evaluate, compare copies and save, where it is time for it."""
        training, position, config = self.training, self.position, self.training.config
        if training.profile is not None:
            training.profile.after_step(position.step)
        if training.crosses(before, position, config.eval.every_tokens) and not step.last:
            self.saver.note_evaluation(position.step, run_evaluation(training, position))
        self._owed |= self.saver.due(before, position)
        # While nothing is learnt nothing is committed either: it would push out what there was before.
        learnt = not self.health.skipping and not is_jumped(step.first, step.end, before.jumps)
        saves = step.last or ((self._owed or stopping) and learnt)
        every = config.health.replica_steps
        if every and (saves or position.step % every == 0):
            self._require_equal_copies()
        if saves:
            self._owed = False
            self._save(wait=step.last or stopping)

    def _save(self, wait: bool) -> None:
        further = {"interval": self.interval.state(), "health": self.health.state()}
        with self.training.watchdog.phase("save"):
            self.saver.save(self.position, wait=wait, suspect=self.health.streak is not None, further=further)

    def _settle(self) -> None:
        with self.training.watchdog.phase("save"):
            self.saver.settle()

    def _require_equal_copies(self) -> None:
        """Before anything is committed too, so that no checkpoint has a part of a copy that went astray."""
        training, step = self.training, self.position.step
        differing = training.engine.differing_ranks()
        if not differing:
            return
        hosts = [training.watchdog.hosts[rank] for rank in differing]
        for rank, host in zip(differing, hosts, strict=True):
            training.reporter.event("replica", rank=rank, host=host, step=step)
        named = ", ".join(f"{rank} on {host}" for rank, host in zip(differing, hosts, strict=True))
        raise ReplicaError(
            f"After step {step} ranks that must hold the same weights do not: look at rank {named} (a flipped bit of "
            f"memory, or a link). Nothing of it is committed. Start again: the run goes on from its last checkpoint; "
            f"if it comes back on the same host, take that out of the job."
        )

    def _finish(self) -> ExitCode:
        """Commit and evaluate what there is at the end, once, whatever lives it takes."""
        training, position = self.training, self.position
        self._save(wait=True)
        if not training.engine.ranks.any(training.reporter.is_evaluated(position.step)):
            run_evaluation(training, position)
        training.reporter.event("finish", step=position.step, tokens=training.tokens(position))
        return ExitCode.DONE


def run_evaluation(training: Training, position: Position) -> list[Evaluation]:
    """Evaluate and report."""
    config, stage = training.config, training.stage
    for source in sources_without_evaluation(training.data, stage):
        training.reporter.message(f"source '{source}' has too few held-out rows and is not evaluated")
    rows, micro_rows = config.eval.rows_per_source, config.train.micro_batch_rows
    began = time.monotonic()
    with training.watchdog.phase("evaluate"):
        results = evaluate(training.engine, stage, training.data, rows, micro_rows)
    seconds = time.monotonic() - began
    training.reporter.evaluation(position.step, training.tokens(position), results, seconds)
    return results


def _batches(training: Training, position: Position) -> Prefetcher[Step, tuple[Step, Batch | None]]:
    """Every step from a position on, with this rank's contiguous slice of its global batch, read ahead; None for a
    step that is passed over, whose rows are not read."""
    world, rank = training.engine.ranks.world_size, training.engine.ranks.rank

    def read(step: Step) -> tuple[Step, Batch | None]:
        if is_jumped(step.first, step.end, position.jumps):
            return step, None
        share = step.rows // world
        positions = np.arange(step.first, step.end, dtype=np.int64)
        return step, training.data.read(positions, slice(rank * share, (rank + 1) * share))

    return prefetch(read, steps(training.config.train, training.data.row_tokens, position.row))


def _regime(training: Training, step: Step) -> list[int]:
    """What the level of losses hangs on: the phase of the mixture, and the rows of the batch."""
    return [int(np.searchsorted(np.cumsum(training.data.order.phase_rows), step.first, side="right")), step.rows]


def _updates(
    training: Training, step: Step, batch: Batch, before_update: Callable[[], None]
) -> Iterator[tuple[Sequence[MicroBatch], StepResult]]:
    """Make the updates that the stage makes of a batch: of each, this rank's micro-batches and what came of them."""
    engine, stage = training.engine, training.stage
    trained = step.first * training.data.row_tokens
    lr = _learning_rate(training, step)
    rates = {group: lr * factor for group, factor in stage.rates(trained).items()}
    parts = batch.micro_batches(training.config.train.micro_batch_rows)
    for micros in stage.updates(parts, trained, engine.reading):
        yield micros, engine.train_step(micros, rates, before_update)


def _json(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None


def _learning_rate(training: Training, step: Step) -> float:
    config = training.config
    end = step.end * training.data.row_tokens
    return learning_rate(config.schedule, config.optimizer.lr, config.train.total_tokens, end)


def _after(position: Position, step: Step) -> Position:
    return replace(position, step=position.step + 1, row=step.end)


def _advance(position: Position, result: StepResult) -> Position:
    return replace(
        position,
        applied=position.applied + result.applied,
        tokens_seen=position.tokens_seen + result.totals.tokens,
        skipped_in_a_row=0 if result.applied else position.skipped_in_a_row + 1,
    )
