"""Notices that a rank does not come on, says which one, and ends all of them so that a launcher can start again.

Every rank tells the others once a second, through the run's store, in which phase of which step its main thread is. A
rank whose own phase outlasts its deadline looks at what the others said: one that says nothing new (stopped, or its
machine is gone) is the late one, else the one that is furthest behind. All ranks write the stacks of their threads into
the run directory and end with exit code 87.

Two threads: `heart` talks to the store, which can itself be out of reach (rank 0 serves it); `clock` only looks at the
time and at what `heart` has found, so that nothing can hold it up.
"""

from __future__ import annotations

import faulthandler
import json
import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from rxt_dist.config.run import DeadlinesConfig
from rxt_dist.errors import ExitCode
from rxt_dist.train.events import EventLog, now

# In the order in which a step goes through them: of two ranks in one step the earlier is behind.
PHASES = ("set-up", "load", "data", "step", "boundary", "evaluate", "save")
# A step may take so many times the median of the last ones.
_STEP_FACTOR, _STEPS_KEPT, _STEPS_LEAST = 10, 20, 3
_BEAT_SECONDS = 1.0
# So many beats without news make a rank a silent one; so many are waited for before a rank ends.
_SILENT_BEATS = 3
# Where some phase may take any time.
_EVER = 30 * 24 * 3600
# A thread that wakes so many beats late was not running, and neither was its process.
_PAUSED_BEATS = 2


class Channel(Protocol):
    """What is asked of the run's store (torch.distributed.Store), by one thread."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...


@dataclass(frozen=True)
class Surroundings:
    """Of which rank, on which hosts (by rank), in which run directory; channel: None for a rank that is alone."""

    rank: int
    hosts: Sequence[str]
    logs: Path
    events: EventLog
    channel: Channel | None


class _State(NamedTuple):
    """Where the main thread is, since when on the clock of `_awake`; `changes` counts phases entered so far."""

    phase: str
    since: float
    step: int
    changes: int


@dataclass(frozen=True)
class Verdict:
    """Which rank is late, in which phase, after how many seconds, and how that is known."""

    rank: int
    phase: str
    seconds: float
    step: int
    how: str


class Watchdog:
    """Watches the main thread of this process, and with those of the other ranks all of them; a context manager.

    It begins in the phase `set-up`, into which every other phase returns.
    """

    def __init__(self, deadlines: DeadlinesConfig, place: Surroundings) -> None:
        self._deadlines = {
            "set-up": deadlines.set_up,
            "load": deadlines.load,
            "data": deadlines.data,
            "step": deadlines.step,
            # Log lines, and whether to save or stop: ranks talk there too.
            "boundary": deadlines.step,
            "evaluate": deadlines.evaluate,
            "save": deadlines.save,
        }
        self.hosts = place.hosts
        self._place = place
        self._beat_s = min([_BEAT_SECONDS, *(limit / 4 for limit in self._deadlines.values() if limit)])
        self._paused = 0.0
        self._steps: deque[float] = deque(maxlen=_STEPS_KEPT)
        self._state = _State("set-up", time.monotonic(), 0, 0)
        self._expired: _State | None = None
        self._verdict: tuple[Verdict, bool] | None = None
        self._closing = threading.Event()
        # The terminal, before this rank's output goes to its log file.
        self._terminal = os.dup(2)
        self._threads = [threading.Thread(target=self._clock, name="rxt-watchdog", daemon=True)]
        if place.channel is not None:
            self._threads.append(threading.Thread(target=self._heart, name="rxt-heart", daemon=True))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closing.set()
        for thread in self._threads:
            # One that waits for a store that is gone ends with the process.
            thread.join(self._beat_s + 1.0)
        os.close(self._terminal)

    @contextmanager
    def phase(self, name: str, step: int | None = None) -> Iterator[None]:
        """The main thread is in phase `name` (of `step`; without it, of the one before) while the block lasts."""
        outer, began = self._state, time.monotonic()
        self._enter(name, outer.step if step is None else step)
        try:
            yield
        finally:
            if name == "step":
                self._steps.append(time.monotonic() - began)
            self._enter(outer.phase, self._state.step)

    def deadline(self, phase: str) -> float:
        """Seconds that a phase may take; 0: any number."""
        limit = self._deadlines[phase]
        if phase in ("step", "boundary") and limit and len(self._steps) >= _STEPS_LEAST:
            return max(limit, _STEP_FACTOR * median(self._steps))
        return limit

    def _enter(self, phase: str, step: int) -> None:
        self._state = _State(phase, self._awake(), step, self._state.changes + 1)

    def _awake(self) -> float:
        """A clock that stands still while this process does."""
        return time.monotonic() - self._paused

    # ------------------------------------------------------------------------------------------------------------------
    # The thread that looks at the time
    # ------------------------------------------------------------------------------------------------------------------

    def _clock(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(self._beat_s):
            woken = time.monotonic()
            late = woken - last - self._beat_s
            last = woken
            if late > _PAUSED_BEATS * self._beat_s:
                self._paused += late
            state = self._state
            limit = self.deadline(state.phase)
            if self._verdict is None and limit and self._awake() - state.since > limit:
                self._await_verdict(state)
            if self._verdict is not None and not self._closing.is_set():
                self._end(*self._verdict)

    def _await_verdict(self, state: _State) -> None:
        """Let `heart` find out who is late; where the store does not answer, it is the rank that serves it."""
        seconds = self._awake() - state.since
        if self._place.channel is None:
            self._verdict = Verdict(self._place.rank, state.phase, seconds, state.step, "it is the only rank"), True
            return
        self._expired = state
        end = time.monotonic() + (2 * _SILENT_BEATS + 4) * self._beat_s
        while self._verdict is None and time.monotonic() < end:
            if self._state.changes != state.changes or self._closing.wait(self._beat_s / 4):
                self._expired = None
                return
        if self._verdict is None:
            # Of those that can still speak one is enough; rank 0 served the store.
            how = "its store does not answer"
            self._verdict = Verdict(0, state.phase, seconds, state.step, how), self._place.rank == 1

    def _end(self, verdict: Verdict, speaks: bool) -> None:
        """Write this rank's stacks, say what is known if it falls to this rank, and end the process."""
        place = self._place
        with suppress(OSError):
            place.logs.mkdir(parents=True, exist_ok=True)
            with open(place.logs / f"stacks-rank-{place.rank}.txt", "a", encoding="utf-8") as file:
                file.write(f"{now()} phase {self._state.phase}, step {self._state.step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        if speaks:
            host, seconds = place.hosts[verdict.rank], round(verdict.seconds, 1)
            with suppress(Exception):
                place.events.append(
                    "hang", phase=verdict.phase, rank=verdict.rank, host=host, seconds=seconds, step=verdict.step
                )
            text = (
                f"error: rank {verdict.rank} on {host} does not come on in phase '{verdict.phase}' of step "
                f"{verdict.step} ({verdict.how}), after {seconds} s. The stacks of all ranks that still answer are in "
                f"{place.logs}/stacks-rank-*.txt. Exit code {int(ExitCode.HANG)}: the run may be started again.\n"
            )
            with suppress(OSError):
                os.write(self._terminal, text.encode())
        # Rank 0 serves the store: the others still have to read there that they are to end.
        time.sleep(_SILENT_BEATS * self._beat_s)
        os._exit(ExitCode.HANG)

    # ------------------------------------------------------------------------------------------------------------------
    # The thread that talks to the other ranks
    # ------------------------------------------------------------------------------------------------------------------

    def _heart(self) -> None:
        channel = self._place.channel
        assert channel is not None
        beat = 0
        # A store that is gone ends this thread: what it leaves unanswered, `clock` notices.
        with suppress(Exception):
            while not self._closing.wait(self._beat_s):
                beat += 1
                state = self._state
                said = {"beat": beat, "phase": state.phase, "step": state.step, "changes": state.changes}
                channel.set(str(self._place.rank), json.dumps(said))
                if channel.check(["verdict"]):
                    self._verdict = self._verdict or (Verdict(**json.loads(channel.get("verdict"))), False)
                elif self._expired is not None and channel.add("asked", 1) == 1:
                    self._find_out(channel, self._expired)

    def _find_out(self, channel: Channel, state: _State) -> None:
        """Name the late rank, for all."""
        before = self._listen(channel)
        self._closing.wait(_SILENT_BEATS * self._beat_s)
        after = self._listen(channel)
        if self._state.changes != state.changes:
            # It came on after all, and another rank may have to ask some day.
            channel.add("asked", -1)
            self._expired = None
            return
        rank, how = late_rank(before, after, len(self._place.hosts), self._place.rank)
        found = after.get(rank, {})
        seconds = self._awake() - state.since
        verdict = Verdict(rank, found.get("phase", state.phase), seconds, found.get("step", state.step), how)
        channel.set("verdict", json.dumps(vars(verdict)))
        self._verdict = verdict, True

    def _listen(self, channel: Channel) -> dict[int, dict[str, Any]]:
        """What each rank last said; ranks that never said anything are absent."""
        ranks = range(len(self._place.hosts))
        return {rank: json.loads(channel.get(str(rank))) for rank in ranks if channel.check([str(rank)])} | {
            self._place.rank: {"beat": time.monotonic(), "phase": self._state.phase, "step": self._state.step}
        }


def late_rank(
    before: Mapping[int, Mapping[str, Any]], after: Mapping[int, Mapping[str, Any]], ranks: int, asking: int
) -> tuple[int, str]:
    """Which rank is late, and how that is known.

    Args:
        before, after: what the ranks said, some beats apart; one that never said anything is in neither.
        asking: the rank that asks, which is named where all are in the same place.
    """
    silent = [rank for rank in range(ranks) if before.get(rank, {}).get("beat") == after.get(rank, {}).get("beat")]
    if silent:
        return min(silent), "it gives no sign of life: stopped, or its machine is gone"
    places = {rank: (said["step"], PHASES.index(said["phase"])) for rank, said in after.items()}
    furthest_behind = min(places, key=lambda rank: (places[rank], rank))
    if len(set(places.values())) == 1:
        return asking, "all ranks are in the same phase; compare their stacks"
    return furthest_behind, "the others are further and wait for it"


def collective_timeout(deadlines: DeadlinesConfig) -> timedelta:
    """How long a collective operation may wait for other ranks: longer than any deadline, so that the watchdog, which
    knows more, is first."""
    limits = list(deadlines.model_dump().values())
    return timedelta(seconds=_EVER if 0 in limits else 1.5 * max(limits) + 60)
