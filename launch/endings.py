"""From how each rank ended to what the life ended with, and what is said about it: once, and of the rank it began with.

When one rank ends, the others lose their connection to it and end in tracebacks of their own. Those are not shown.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from launch.watching import RankEnd
from rxt_dist.errors import ExitCode, may_start_again

TAIL_LINES = 15
_ERRORS_SHOWN = 3
# What ranks say of which only the connection to another one broke.
_LOST = re.compile(
    r"closed by peer|reset by peer|Broken pipe|Connection refused|rank \d+ failed:|Dist(Backend|Network|Store)Error"
    r"|NCCL (error|communicator)|Timed out waiting"
)
# A crash in native code, as faulthandler tells of it: its first line, and the others.
_FATAL = "Fatal Python error: "
_STACKS = re.compile(r"$|Current thread|Thread 0x|  |\.\.\.|Extension modules:")


@dataclass(frozen=True)
class Ending:
    """What a life ended with: its exit code, why in one sentence, and what to print of it."""

    code: int
    reason: str
    text: str = ""
    port_was_taken: bool = False


def ending_of(ends: Sequence[RankEnd], logs: Path | None) -> Ending:
    """The ending of a life.

    Args:
        ends: of all ranks, in the order in which they were seen.
        logs: where ranks have their log files; None: not known, or the life has not begun to write there.
    """
    codes = [_exit_code(end.returncode) for end in ends]
    for code in (ExitCode.STOPPED, ExitCode.PREEMPTED):
        if code in codes:
            return Ending(code, "a stop was asked for")
    bad = [end for end in ends if end.returncode]
    if not bad:
        return Ending(ExitCode.DONE, "all ranks ended")
    culprit = min(bad, key=_suspicion)
    return _ending_by(culprit, bad, logs)


def _suspicion(end: RankEnd) -> tuple[int, float]:
    """Lowest for the rank with which it began."""
    words = _read(end.rank.words)
    at = end.rank.words.stat().st_mtime if words else end.at
    if end.killed_for:
        # One that hung before all others ended began it; one that was killed after a failure did not.
        return (1 if "SIGSTOP" in end.killed_for else 5), at
    if not may_start_again(_exit_code(end.returncode)):
        return 0, at
    if end.returncode < 0:
        return 2, at
    return (4 if _LOST.search(words) else 3), at


def _ending_by(culprit: RankEnd, bad: Sequence[RankEnd], logs: Path | None) -> Ending:
    number, words = culprit.rank.number, _read(culprit.rank.words)
    code = _exit_code(culprit.returncode)
    if culprit.killed_for:
        hung = [end for end in bad if end.killed_for == culprit.killed_for]
        names = ", ".join(f"rank {end.rank.number} (process {end.rank.process.pid})" for end in hung)
        reason = f"{names} {culprit.killed_for} and was killed"
        return Ending(ExitCode.HANG, reason, f"{reason}{_tail(culprit, logs)}")
    if words.startswith("error: "):
        said = list(dict.fromkeys(text for end in bad if (text := _read(end.rank.words)).startswith("error: ")))
        said = [words, *(text for text in said if text != words)][:_ERRORS_SHOWN]
        taken = code == ExitCode.UNAVAILABLE and number == 0
        return Ending(code, words.removeprefix("error: ").strip(), "".join(said).rstrip(), taken)
    if culprit.returncode < 0:
        reason = f"rank {number} was killed by signal {-culprit.returncode} ({_meaning(-culprit.returncode)})"
    elif words:
        reason = f"rank {number} failed: {words.rstrip().rsplit(chr(10), 1)[-1]}"
    else:
        reason = f"rank {number} ended with exit code {code}"
    return Ending(code, reason, f"{reason}{_tail(culprit, logs)}")


def _tail(end: RankEnd, logs: Path | None) -> str:
    """The last lines that a rank has left, and where the others are; of the first rank's output, which was seen on the
    terminal, only a traceback."""
    log = logs / f"rank-{end.rank.number:05d}.log" if logs else None
    words = _read(end.rank.words)
    text = words or (_read(log) if log else "") or _read(end.rank.output)
    if not text.strip() or (end.rank.number == 0 and not words):
        return ""
    lines = text.rstrip().split("\n")
    where = f" of {log}" if log and log.exists() else ""
    shown = _crash(lines) or lines[-TAIL_LINES:]
    return f"; the last lines{where}:\n" + "\n".join(f"  {line}" for line in shown)


def _crash(lines: Sequence[str]) -> list[str]:
    """What a library said before it crashed, and where the thread that called it stood, innermost first; none where it
    was a thread of its own. Empty where the stacks of a crash are not the last that was written."""
    began = max((number for number, line in enumerate(lines) if line.startswith(_FATAL)), default=len(lines))
    stacks = lines[began + 1 :]
    if not stacks or not all(_STACKS.match(line) for line in stacks):
        return []
    said = lines[max(0, began - TAIL_LINES // 2) : began + 1]
    current = next((number for number, line in enumerate(stacks) if line.startswith("Current thread")), len(stacks))
    frames = takewhile(lambda line: line.strip(), stacks[current:])
    return [*said, *frames][:TAIL_LINES]


def _meaning(number: int) -> str:
    if number == signal.SIGKILL:
        return "out of memory?"
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


def _exit_code(returncode: int) -> int:
    """A shell's reading: 128 + n for a process ended by signal n."""
    return returncode if returncode >= 0 else 128 - returncode
