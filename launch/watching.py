"""Watching the ranks of one life until all have ended, which they do whatever happens to them.

Signals to the launcher are passed on. A rank starts with the stop signals ignored, because each would kill it while it
imports; so a stop signal is repeated every second until the ranks have ended, and for a rank that is the same wish. A
second one a person means: then all ranks are ended at once. Every wait has an end, after which what is left is killed
and named.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Self

from launch.ranks import Rank, send
from rxt_dist.lives import ONE_REQUEST_SECONDS, STOP_SIGNALS

if TYPE_CHECKING:
    from rxt_dist.config.run import DeadlinesConfig

_POLL_SECONDS = 0.05
_SLOW_SECONDS = 1.0


@dataclass(frozen=True)
class Patience:
    """How long the launcher waits for what, in seconds.

    grace: for the other ranks, after one has failed, or all were told to end at once. answer: for all ranks to end
    after a stop signal, and after the first has ended well. suspended: for a rank that SIGSTOP stopped. back_off:
    before the first restart; twice as long before each further one that follows a life without a new checkpoint.
    """

    grace: float = 10.0
    answer: float = 900.0
    suspended: float = 60.0
    back_off: float = 1.0
    back_off_most: float = 60.0

    @classmethod
    def of(cls, deadlines: DeadlinesConfig) -> Self:
        """That with a run whose watchdogs have these deadlines: a stop is answered after the phase that a rank is in,
        and a rank that is late there ends itself, which says more than an end by the launcher."""
        limits = list(deadlines.model_dump().values())
        return cls(answer=math.inf if 0 in limits else sum(limits) + cls.grace)


@dataclass
class Received:
    """Signals that this process got; handlers only note them, the watching loop passes them on."""

    stop: int | None = None
    stop_at: float = 0.0
    at_once: int | None = None
    interrupts_passed: int = 0
    interrupts: int = 0

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        now = time.monotonic()
        if number == signal.SIGINT:
            self.interrupts += 1
            self.at_once = self.at_once or number
        elif self.stop is None:
            self.stop, self.stop_at = number, now
        elif now - self.stop_at > ONE_REQUEST_SECONDS:
            self.interrupts += 1
            self.at_once = self.at_once or number

    @property
    def anything(self) -> bool:
        """Whether somebody wants this launch to end."""
        return self.stop is not None or self.at_once is not None


@contextmanager
def signals_noted() -> Iterator[Received]:
    """Catch what asks for an end while the block lasts. What was ignored before (HUP under nohup) stays so."""
    received = Received()
    caught = [number for number in (*STOP_SIGNALS, signal.SIGINT) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, received.note) for number in caught}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class RankEnd:
    """How one rank ended: its exit code (negative: the signal), when (seconds since the epoch), and, if this launcher
    killed it, why."""

    rank: Rank
    returncode: int
    at: float
    killed_for: str | None = None


@dataclass
class Watch:
    """The ranks of one life."""

    ranks: Sequence[Rank]
    patience: Patience
    received: Received
    ends: list[RankEnd] = field(default_factory=list)
    _killed: dict[int, str] = field(default_factory=dict)
    _suspended_since: dict[int, float] = field(default_factory=dict)
    _deadline: float = math.inf
    _why: str = ""

    def until_all_have_ended(self, tick: Callable[[], None]) -> list[RankEnd]:
        """Wait; `tick` is called about every second. Returns the ends in the order in which they were seen."""
        running, slow_at, repeat_at = list(self.ranks), 0.0, 0.0
        while running:
            now = time.monotonic()
            if self.received.stop is not None and now >= repeat_at:
                send(running, self.received.stop)
                repeat_at = now + _SLOW_SECONDS
            self._pass_interrupts(running)
            if now >= slow_at:
                self._end_the_suspended(running, now)
                tick()
                slow_at = now + _SLOW_SECONDS
            running = self._note_ends(running)
            self._set_deadline(now)
            if now >= self._deadline:
                self._kill(running, self._why)
                if now >= self._deadline + self.patience.grace:
                    # A process that waits for a dead disk cannot even be killed.
                    self.ends += [RankEnd(rank, -signal.SIGKILL, time.time(), self._why) for rank in running]
                    break
            time.sleep(_POLL_SECONDS)
        return self.ends

    def _pass_interrupts(self, running: Sequence[Rank]) -> None:
        while self.received.interrupts_passed < self.received.interrupts:
            send(running, signal.SIGINT)
            self.received.interrupts_passed += 1

    def _note_ends(self, running: Sequence[Rank]) -> list[Rank]:
        for rank in running:
            if rank.process.poll() is not None:
                why = self._killed.get(rank.number)
                self.ends.append(RankEnd(rank, rank.process.returncode, time.time(), why))
        return [rank for rank in running if rank.process.returncode is None]

    def _set_deadline(self, now: float) -> None:
        """The time by which all ranks have to have ended, once anything asks for it; the earliest counts."""
        grace, answer = self.patience.grace, self.patience.answer
        if any(end.returncode for end in self.ends) and not _orderly(self.ends):
            self._end_by(now + grace, f"did not end within {grace:g} s after another rank")
        elif self.ends:
            self._end_by(now + answer, f"did not end within {answer:g} s after another rank")
        if self.received.stop is not None:
            name = signal.Signals(self.received.stop).name
            self._end_by(self.received.stop_at + answer, f"did not answer {name} within {answer:g} s")
        if self.received.at_once is not None:
            name = signal.Signals(self.received.at_once).name
            self._end_by(now + grace, f"did not answer {name} within {grace:g} s")

    def _end_by(self, deadline: float, why: str) -> None:
        if deadline < self._deadline:
            self._deadline, self._why = deadline, why

    def _end_the_suspended(self, running: Sequence[Rank], now: float) -> None:
        """A process that SIGSTOP has stopped answers no signal, holds up all others, and notices no deadline."""
        limit = 0.0 if self.received.at_once is not None else self.patience.suspended
        for rank in running:
            if not rank.is_suspended:
                self._suspended_since.pop(rank.number, None)
            elif now - self._suspended_since.setdefault(rank.number, now) >= limit:
                self._kill([rank], f"was stopped by a signal (SIGSTOP){f' for {limit:g} s' if limit else ''}")

    def _kill(self, ranks: Sequence[Rank], why: str) -> None:
        for rank in ranks:
            self._killed.setdefault(rank.number, why)
        send(ranks, signal.SIGKILL)


def _orderly(ends: Sequence[RankEnd]) -> bool:
    """Whether all that ended did so on request, so that the others are on their way."""
    return all(end.returncode in (0, 75, 76) for end in ends)
