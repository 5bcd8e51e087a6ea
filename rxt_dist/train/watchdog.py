"""Notices that a rank does not come on, says which one, and ends all of them so that a launcher can start again.

Every rank tells the others once a second, through the run's store, in which phase of which step its main thread is, for
how long, and how long it may be. A rank whose own phase outlasts its deadline looks at what the others said: one that
has said nothing new for that time (stopped, or its machine is gone) is the late one, else the one that is furthest
behind, once its own phase outlasts its deadline too. All ranks write the stacks of their threads into the run directory
and end with exit code 87.

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
from typing import NamedTuple, Protocol, Self

from rxt_dist.config.run import DeadlinesConfig
from rxt_dist.errors import ExitCode
from rxt_dist.train.events import EventLog, now

# A step may take so many times the median of the last ones.
_STEP_FACTOR, _STEPS_KEPT = 10, 20
_BEAT_SECONDS = 1.0
# So many beats lie between the two looks that must agree on who is late; so many are waited for before a rank ends.
_SILENT_BEATS = 3
# Silent for this part of the deadline of the rank that waits: stopped. A main thread that imports or pickles for long
# holds up its process's beats too, and is not. Before its deadline a rank looks so often, to know how long.
_SILENT_SHARE, _LOOKS = 0.75, 8
# Where some phase may take any time.
_EVER = 30 * 24 * 3600
# Of the time between two looks at the clock no more counts: in what is beyond it the process was not running.
_TICK_BEATS = 2


class Channel(Protocol):
    """What is asked of the run's store (torch.distributed.Store), by one thread."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


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


class Said(NamedTuple):
    """What a rank tells the others in a beat; `limit`: seconds that its phase may take, 0: any number."""

    beat: int
    phase: str
    step: int
    changes: int
    seconds: float
    limit: float

    @property
    def overdue(self) -> bool:
        return 0 < self.limit < self.seconds


@dataclass(frozen=True)
class Verdict:
    """Which rank is late, in which phase, after how many seconds, how that is known, and which rank found it."""

    rank: int
    phase: str
    seconds: float
    step: int
    how: str
    by: int


class Watchdog:
    """Watches the main thread of this process, and with those of the other ranks all of them; a context manager.

    It begins in the phase `set-up`, into which every other phase returns.
    """

    def __init__(self, deadlines: DeadlinesConfig, place: Surroundings) -> None:
        self._deadlines = {
            "set-up": deadlines.set_up,
            # It may compile.
            "first-step": deadlines.set_up,
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
        self._beat_s = min([_BEAT_SECONDS, *(limit / 8 for limit in self._deadlines.values() if limit)])
        # When `clock` last looked, and how long this process had been running by then.
        self._ticked = time.monotonic(), 0.0
        self._steps: deque[float] = deque(maxlen=_STEPS_KEPT)
        self._state = _State("set-up", 0.0, 0, 0)
        # Of `heart`: its beats, when the store last answered, by rank what was last said and the own beat at which that
        # was new, and who was late at the last look, for which own phase.
        self._beat, self._looked, self._heard = 0, 0, 0.0
        self._news: dict[int, tuple[Said | None, int]] = {}
        self._suspect: tuple[int, int, int] | None = None
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
        outer, began = self._state, self._awake()
        self._enter(name, outer.step if step is None else step)
        try:
            yield
        finally:
            if name in ("step", "first-step"):
                self._steps.append(self._awake() - began)
            self._enter(outer.phase, self._state.step)

    def deadline(self, phase: str) -> float:
        """Seconds that a phase may take; 0: any number."""
        limit = self._deadlines[phase]
        if phase in ("step", "boundary") and limit and (taken := tuple(self._steps)):
            return max(limit, _STEP_FACTOR * median(taken))
        return limit

    def _enter(self, phase: str, step: int) -> None:
        self._state = _State(phase, self._awake(), step, self._state.changes + 1)

    def _awake(self) -> float:
        """A clock that stands still while this process does."""
        ticked, awake = self._ticked
        return awake + min(time.monotonic() - ticked, _TICK_BEATS * self._beat_s)

    def _patience(self, limit: float) -> float:
        """Seconds of silence that a rank takes for a stop when its own phase outlasts `limit`."""
        return max(2 * _SILENT_BEATS * self._beat_s, _SILENT_SHARE * limit)

    # ------------------------------------------------------------------------------------------------------------------
    # The thread that looks at the time
    # ------------------------------------------------------------------------------------------------------------------

    def _clock(self) -> None:
        while not self._closing.wait(self._beat_s):
            self._tick()
            if self._verdict is not None and not self._closing.is_set():
                self._end(*self._verdict)

    def _tick(self) -> None:
        awake = self._awake()
        self._ticked = time.monotonic(), awake
        state = self._state
        limit = self.deadline(state.phase)
        if self._verdict is None and limit and awake - state.since > limit:
            self._verdict = self._without_others(state, awake, limit)

    def _without_others(self, state: _State, awake: float, limit: float) -> tuple[Verdict, bool] | None:
        """Who is late where `heart` cannot find out: this rank alone, or the one whose store does not answer."""
        rank = self._place.rank
        if self._place.channel is None:
            how = "it is the only rank"
            return Verdict(rank, state.phase, awake - state.since, state.step, how, rank), True
        silence = awake - self._heard
        if silence <= self._patience(limit):
            return None
        # Of those that can still speak one is enough; rank 0 served the store.
        return Verdict(0, state.phase, silence, state.step, "its store does not answer", rank), rank == 1

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
        while not self._closing.wait(self._beat_s):
            self._pulse(channel)

    def _pulse(self, channel: Channel) -> None:
        """A beat counts when the store answered. It may fail for a moment; one that is gone is noticed by `clock`."""
        with suppress(Exception):
            self._exchange(channel)
            self._heard = self._awake()
            self._beat += 1

    def _exchange(self, channel: Channel) -> None:
        """Say where this rank is, hear whether all are to end, and look who is late where time is up."""
        state = self._state
        own = self._said(state)
        channel.set(str(self._place.rank), json.dumps(own._asdict()))
        if channel.check(["verdict"]):
            self._verdict = self._verdict or (Verdict(**json.loads(channel.get("verdict"))), False)
            return
        often = own.limit / _LOOKS
        beats = _SILENT_BEATS if own.overdue else max(1, int(often / self._beat_s))
        if own.limit and own.seconds > often and self._beat - self._looked >= beats:
            self._looked = self._beat
            self._listen(channel)
            if own.overdue:
                self._judge(channel, state, own)

    def _said(self, state: _State) -> Said:
        seconds, limit = self._awake() - state.since, self.deadline(state.phase)
        return Said(self._beat, state.phase, state.step, state.changes, seconds, limit)

    def _listen(self, channel: Channel) -> None:
        """Note what each other rank last said, and since when it has said nothing new."""
        for rank in set(range(len(self._place.hosts))) - {self._place.rank}:
            said = Said(**json.loads(channel.get(str(rank)))) if channel.check([str(rank)]) else None
            if rank not in self._news or self._news[rank][0] != said:
                self._news[rank] = said, self._beat

    def _judge(self, channel: Channel, state: _State, own: Said) -> None:
        """Name the late rank, for all: the first to do so is the one that speaks.

        Two looks have to agree, some beats apart: whoever was late and comes on at this moment is let go.
        """
        place = self._place
        said = {rank: last for rank, (last, _) in self._news.items()} | {place.rank: own}
        # In beats of its own: where all stood still together, nobody was silent.
        silence = {rank: (self._beat - since) * self._beat_s for rank, (_, since) in self._news.items()}
        late = late_rank(said, silence, place.rank, self._patience(own.limit), _SILENT_BEATS * self._beat_s)
        if late is None:
            self._suspect = None
            return
        rank, how = late
        found = said[rank] or own
        suspect = rank, found.changes, state.changes
        if suspect != self._suspect:
            self._suspect = suspect
        elif self._state.changes == state.changes:
            seconds = found.seconds if rank == place.rank else found.seconds + silence[rank]
            text = json.dumps(vars(Verdict(rank, found.phase, seconds, found.step, how, place.rank)))
            kept = channel.compare_set("verdict", "", text).decode()
            self._verdict = Verdict(**json.loads(kept)), kept == text


def late_rank(
    said: Mapping[int, Said | None], silence: Mapping[int, float], asking: int, patience: float, least: float
) -> tuple[int, str] | None:
    """Which rank is late, and how that is known; None while it is only slow.

    All ranks enter the same phases one after the other, so the one that entered fewest is behind.

    Args:
        said: by rank, what it last said; None of one that never said anything.
        silence: by rank except the asking one, seconds without news.
        asking: the rank that asks, whose phase outlasts its deadline; named where all are in the same place.
        patience: seconds of silence that are a stop whatever the silent rank last said.
        least: seconds of silence that are one if the silent rank's own phase outlasts its deadline.
    """
    for rank, seconds in sorted(silence.items()):
        last = said[rank]
        outlasts = last is not None and last._replace(seconds=last.seconds + seconds).overdue
        if seconds >= patience or (seconds >= least and outlasts):
            return rank, "it gives no sign of life: stopped, or its machine is gone"
    spoken = {rank: last for rank, last in sorted(said.items()) if last is not None}
    fewest = min(last.changes for last in spoken.values())
    behind = [rank for rank, last in spoken.items() if last.changes == fewest]
    # One that has only just come to where the others waited for it may let them all go on.
    if len(spoken) < len(said) or not all(spoken[rank].overdue for rank in behind):
        return None
    if len(behind) == len(said):
        return asking, "all ranks are in the same phase; compare their stacks"
    return behind[0], "the others are further and wait for it"


def collective_timeout(deadlines: DeadlinesConfig) -> timedelta:
    """How long a collective operation may wait for other ranks: longer than any deadline, so that the watchdog, which
    knows more, is first."""
    limits = list(deadlines.model_dump().values())
    return timedelta(seconds=_EVER if 0 in limits else 1.5 * max(limits) + 60)
