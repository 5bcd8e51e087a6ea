"""What the parts of a training have in common: everything that one life of a run works with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.run import RunConfig
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import ExitCode
from rxt_dist.stages.base import DataSource, Stage
from rxt_dist.train.profile import StepProfile
from rxt_dist.train.reporter import Reporter
from rxt_dist.train.resume import Position
from rxt_dist.train.run_dir import RunDirectory
from rxt_dist.train.signals import StopRequest
from rxt_dist.train.watchdog import Watchdog


@dataclass(frozen=True)
class Training:
    """Engine, stage, data and files of one life of a run; identity is what every checkpoint says of it."""

    config: RunConfig
    engine: Engine
    stage: Stage
    frozen: FrozenWeights
    data: DataSource
    store: CheckpointStore
    stop: StopRequest
    reporter: Reporter
    identity: dict[str, Any]
    directory: RunDirectory
    watchdog: Watchdog
    profile: StepProfile | None = None

    def agreed(self, back: bool) -> tuple[ExitCode | None, str, bool]:
        """At a step boundary, on all ranks together: what the run is to end with (None: it goes on), why, and whether
        it goes back, as it does if any rank says so.

        Raises:
            SupersededError: the run is in another life.
        """
        ranks, reason = self.engine.ranks, self.stop.reason
        person = reason is not None and self.stop.code == ExitCode.STOPPED
        stopped, stopping, back, superseded = ranks.agree(
            person, reason is not None, back, self.directory.is_superseded
        )
        if superseded:
            ranks.together(self.directory.require_life)
        code = ExitCode.STOPPED if stopped else ExitCode.PREEMPTED
        return code if stopping else None, reason or "another rank was asked to stop", back

    def tokens(self, position: Position) -> int:
        """What the budget says has been trained."""
        return position.row * self.data.row_tokens

    def crosses(self, before: Position, after: Position, every_tokens: int) -> bool:
        """Whether a multiple of `every_tokens` lies between two positions; 0 means never."""
        if not every_tokens:
            return False
        return self.tokens(before) // every_tokens != self.tokens(after) // every_tokens
