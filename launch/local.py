"""All ranks of a run on this machine: started, watched, started again where that is right, with one exit code for all.

It never hangs (`watching.py`), says once how a life ended (`endings.py`), and keeps a log of it (`record.py`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from launch.endings import Ending, ending_of
from launch.ranks import Rank, rank_environment, start, words_file
from launch.record import Record
from launch.watching import Patience, Received, Watch, signals_noted
from rxt_dist.errors import ExitCode, may_start_again
from rxt_dist.files import forget_terminal
from rxt_dist.lives import TIME_LIMIT, Life, file_identity
from rxt_dist.ranks import free_port

# Lives in a row without a new checkpoint, each a restart: then it is no accident.
CRASH_LOOP_RESTARTS = 3
# Between the choice of a port and its use lie the imports of rank 0.
_PORT_TRIES = 3
_POLL_SECONDS = 0.05


@dataclass
class Launch:
    """What is launched.

    command: what each rank executes; rank facts reach it by torchrun's environment variables. ranks: how many.
    resume_attempts: how often to start all ranks again after a preemption or a crash; progress restores them. run: the
    run directory; None: nothing is kept, and no life is known to make progress. seconds: time limit of all lives
    together. old_stop: identity of the STOP file that was there when the launch began; None: look now. once: further
    arguments of the command until a life has taken the run with them; those after it must not repeat them.
    """

    command: Sequence[str]
    ranks: int
    resume_attempts: int = 0
    run: Path | None = None
    seconds: float | None = None
    old_stop: str | None = None
    once: Sequence[str] = ()
    patience: Patience = field(default_factory=Patience)

    def __post_init__(self) -> None:
        # By a clock that nobody sets: the day of a machine may jump.
        self._end = time.monotonic() + self.seconds if self.seconds is not None else None
        if self.old_stop is None:
            self.old_stop = file_identity(self.run / "STOP") if self.run else ""

    @property
    def stop_asked(self) -> bool:
        """Whether a person has made a STOP file since the launch began."""
        return self.run is not None and file_identity(self.run / "STOP") not in ("", self.old_stop)

    @property
    def deadline(self) -> float | None:
        """When the time limit is over, in seconds since the epoch as the clock stands now; None: there is none."""
        return None if self._end is None else time.time() + self._end - time.monotonic()

    @property
    def time_is_over(self) -> bool:
        """Whether the time limit leaves no room for another life."""
        return self._end is not None and time.monotonic() >= self._end


def launch(wanted: Launch, received: Received | None = None) -> int:
    """Run until all ranks have ended, and again after a preemption or a crash, as often as is wanted.

    After a signal to this process, a STOP file or the time limit nothing is started again.

    Args:
        received: signals that the caller notes, who does something after this too; None: they are noted here.

    Returns:
        The exit code of the last life: 76 or 75 if a rank says stopped or preempted, else that of the rank with which
        the failure began, else 0; 93 after three restarts without a new checkpoint.
    """
    record = Record(wanted.run)
    left, barren, attempt = wanted.resume_attempts, list[tuple[int, str]](), 0
    with signals_noted() if received is None else nullcontext(received) as received:
        while True:
            before = record.committed()
            ending = _life(wanted, record, received, attempt)
            if ending.text:
                _say(ending.text)
            over = wanted.time_is_over or ending.reason.startswith(TIME_LIMIT)
            if not may_start_again(ending.code) or received.anything or over:
                return ending.code
            progressed = bool(record.committed() - before)
            if progressed:
                left, barren = wanted.resume_attempts, []
            if ending.code != ExitCode.PREEMPTED and not progressed:
                barren.append((attempt, f"{ending.code}: {ending.reason}"))
            if sum(restart > 0 for restart, _ in barren) >= CRASH_LOOP_RESTARTS:
                return _give_up(record, [reason for _, reason in barren])
            if left == 0:
                return ending.code
            left, attempt = left - 1, attempt + 1
            seconds = min(wanted.patience.back_off * 2 ** max(0, len(barren) - 1), wanted.patience.back_off_most)
            text = f"ranks ended with exit code {ending.code}; starting again in {seconds:g} s (restart {attempt}"
            _note(record, f"{text}; {left} more, unless there is a new checkpoint)")
            if not _wait(seconds, wanted, received):
                return _not_started_again(wanted, record, received, ending)


def _life(wanted: Launch, record: Record, received: Received, attempt: int) -> Ending:
    """One life; on another port if another process has taken the one that was chosen."""
    for _ in range(_PORT_TRIES):
        ending = _one_life(wanted, record, received, attempt)
        if not ending.port_was_taken or received.anything:
            break
        _note(record, "another process has taken the port; starting again on another one")
    return ending


def _one_life(wanted: Launch, record: Record, received: Received, attempt: int) -> Ending:
    """One life on one port. What keeps ranks from being started (no more processes, a full /tmp) is how it ended."""
    token = uuid.uuid4().hex[:12]
    record.new_life(token)
    try:
        ending = _lived(wanted, record, received, attempt, token)
    except OSError as error:
        reason = f"ranks cannot be started ({type(error).__name__}: {error})"
        ending = Ending(ExitCode.CRASH, reason, reason)
    return replace(ending, reason=record.ended(ending.code, ending.reason))


def _lived(wanted: Launch, record: Record, received: Received, attempt: int, token: str) -> Ending:
    port, ranks = free_port(), list[Rank]()
    command = [*wanted.command, *(() if record.has_started else wanted.once)]
    record.line(f"life {token}, restart {attempt}: {wanted.ranks} ranks on port {port}: {' '.join(command)}")
    launched = time.time()
    with tempfile.TemporaryDirectory(prefix="rxt-launch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            for rank in range(wanted.ranks):
                words = words_file(folder, rank)
                life = Life(token, launched, attempt, wanted.deadline, wanted.old_stop, words)
                environment = rank_environment(os.environ, rank, wanted.ranks, port) | life.environment()
                ranks.append(start(command, environment, rank, folder))
            ends = Watch(ranks, wanted.patience, received).until_all_have_ended(record.flush)
        finally:
            for started in ranks:
                started.process.kill()
                with suppress(subprocess.TimeoutExpired):
                    started.process.wait(wanted.patience.grace)
        record.flush()
        return _asked_for(ending_of(ends, record.logs), received)


def _asked_for(ending: Ending, received: Received) -> Ending:
    """The ending of a life that somebody may have ended at once: then that is the reason."""
    if received.at_once is None or ending.code in (ExitCode.DONE, ExitCode.STOPPED, ExitCode.PREEMPTED):
        return ending
    text = ending.text if ending.code == ExitCode.HANG else ""
    return Ending(128 + received.at_once, f"ended at once by {signal.Signals(received.at_once).name}", text)


def _give_up(record: Record, barren: Sequence[str]) -> int:
    lives = "\n".join(f"  {reason}" for reason in barren)
    _note(
        record,
        f"error: {CRASH_LOOP_RESTARTS} restarts made no new checkpoint, so that another one is of no use. What ended "
        f"each life:\n{lives}\nMend the cause, then start the run again: it goes on from its newest checkpoint.",
    )
    record.gave_up(list(barren))
    return ExitCode.CRASH_LOOP


def _wait(seconds: float, wanted: Launch, received: Received) -> bool:
    """Wait before a restart; False if meanwhile somebody wants none."""
    end = time.monotonic() + seconds
    while not (received.anything or wanted.stop_asked or wanted.time_is_over):
        if time.monotonic() >= end:
            return True
        time.sleep(_POLL_SECONDS)
    return False


def _not_started_again(wanted: Launch, record: Record, received: Received, ending: Ending) -> int:
    """The exit code of a launch that was asked to end while no rank was there. What is committed is safe, as after a
    preemption; without anything committed the end of the last life stays what it was."""
    if wanted.stop_asked:
        why, code = "a STOP file asks for it", int(ExitCode.STOPPED)
    elif received.at_once is not None:
        why, code = f"ended by {signal.Signals(received.at_once).name}", 128 + received.at_once
    else:
        why = signal.Signals(received.stop).name if received.stop is not None else TIME_LIMIT
        code = int(ExitCode.PREEMPTED) if record.committed() else ending.code
    _note(record, f"not started again: {why}")
    return code


def _note(record: Record, text: str) -> None:
    record.line(text)
    _say(text)


def _say(text: str) -> None:
    """To whoever started this; a terminal that is gone is no reason to end a run."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        forget_terminal()
