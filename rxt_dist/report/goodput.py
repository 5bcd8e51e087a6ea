"""Where the wall time of a run went, from its events and metrics alone: at any time, of any version, in whole
milliseconds, so that the parts sum to the wall time exactly.

Wall time runs from the first launch to the end of the last life, or to now while that lives. Each life is launched,
becomes ready, and ends. What its files state of the time after `ready` is taken in the order of `_STATED`, never more
than there is; what nothing states is unaccounted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rxt_dist.errors import ExitCode
from rxt_dist.report.clocks import Clocks
from rxt_dist.report.records import Figures, RunFiles, number, seconds_of

# In the order in which people read them.
PARTS = {
    "productive": "productive steps",
    "checkpoints": "stalls by checkpoints",
    "evaluation": "evaluation",
    "data": "waiting for data",
    "recomputed": "recomputed work",
    "startup": "start-up",
    "downtime": "downtime between lives",
    "unaccounted": "unaccounted",
}
# What was measured by itself comes before what is the rest of an interval of steps.
_STATED = ("checkpoints", "evaluation", "data", "recomputed", "productive")
# A life of which nothing was heard for so long, and for so many times its longest silence, is taken for dead.
_SILENCE_MS, _SILENCES = 600_000, 5
_FINISHED = "finished"
# Thirty years: what is said to have taken longer is not believed.
_LONGEST_S = 1e9


@dataclass
class Life:
    """One life of a run; times in milliseconds since 1970.

    first_step: where it began. steps: how many of its steps the run kept. ended: how, in words. code: its exit code,
    where it is known. parts: of PARTS all but the downtime, which lies before it.
    """

    launched: int
    end: int
    token: str = ""
    ready: int | None = None
    first_step: int = 0
    steps: int = 0
    code: int | None = None
    ended: str = ""
    parts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    downtime: int = 0
    # Written by a version that says when a life starts.
    tells: bool = False
    resumed: bool = False
    longest_silence: int = 0

    # When the steps of its first line began, for lives whose `ready` is not there.
    first_work: int | None = None

    @property
    def over(self) -> bool:
        """Whether it is known how it ended."""
        return self.code is not None

    @property
    def work_began(self) -> int:
        """When its start-up was over; one that made no step only started up."""
        if self.ready is not None:
            return self.ready
        if not self.tells:
            return self.launched
        return self.end if self.first_work is None else self.first_work


@dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went: seconds by part, which sum to `wall_s` (to the millisecond), and its lives.

    state: "empty", "running", "finished", "silent" (no end is written, and nothing was heard for long) or how the last
    life ended.
    """

    wall_s: float
    seconds: Mapping[str, float]
    lives: tuple[Life, ...]
    state: str

    @property
    def share(self) -> Mapping[str, float]:
        """Of the wall time, by part; nothing of no time."""
        return {part: seconds / self.wall_s if self.wall_s else 0.0 for part, seconds in self.seconds.items()}

    def as_json(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "wall_s": self.wall_s,
            "seconds": dict(self.seconds),
            "share": {part: round(share, 6) for part, share in self.share.items()},
            "state": self.state,
            "lives": len(self.lives),
        }


def goodput(run: Path, now: float) -> Goodput:
    """Where the wall time of the run in a folder went.

    Args:
        now: seconds since 1970.

    Raises:
        ConfigError: it is no folder of a run, or cannot be read.
        DiskError: its disk fails.
    """
    return measure(RunFiles(run), now)


def measure(files: RunFiles, now: float) -> Goodput:
    """`goodput` of files that are read already."""
    now_ms = _ms(now)
    events, training, evaluations = _on_right_clocks(files, now)
    lives = _lives(events, training, now_ms)
    if not lives:
        return Goodput(0.0, dict.fromkeys(PARTS, 0.0), (), "empty")
    stated = [dict.fromkeys(_STATED, 0) for _ in lives]
    _hear_figures(lives, stated, training, now_ms)
    _hear_evaluations(lives, evaluations, now_ms)
    _hear_events(lives, stated, events, training, now_ms)
    # A life that began again at an earlier checkpoint has to finish once more.
    turns = [event["kind"] for event in files.events if event["kind"] in ("start", "finish")]
    finished = files.finished is not None or turns[-1:] == ["finish"]
    lives = _without_idle_ends(lives, finished)
    stated = stated[: len(lives)]
    state = _settle_last(lives[-1], finished, now_ms)
    _divide(lives, stated)
    parts = {part: sum(life.parts[part] for life in lives) for part in PARTS}
    parts["downtime"] = sum(life.downtime for life in lives)
    wall = lives[-1].end - lives[0].launched
    assert sum(parts.values()) == wall
    return Goodput(wall / 1000, {part: value / 1000 for part, value in parts.items()}, tuple(lives), state)


def _on_right_clocks(files: RunFiles, now: float) -> tuple[Sequence[Mapping[str, Any]], Figures, Figures]:
    """Events, lines of training and lines of evaluations of a run, whose clock may have been wrong for a while."""
    clocks = Clocks(files.events, now)
    if clocks.right:
        return files.events, files.training, files.evaluations
    training, evaluations = (
        figures.with_times(clocks.lines(figures.column("time"))) for figures in (files.training, files.evaluations)
    )
    return clocks.events(), training, evaluations


def superseded(steps: Iterable[float]) -> list[bool]:
    """Of each line whether a later one is of the same step or an earlier one: its work was done again."""
    found: list[bool] = []
    least = math.inf
    for step in reversed(list(steps)):
        found.append(step >= least)
        least = min(least, step)
    return found[::-1]


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _duration(event: Mapping[str, Any], name: str) -> int:
    """A field in milliseconds; 0 where it is none."""
    value = number(event.get(name))
    return _ms(value) if 0 < value < _LONGEST_S else 0


# ---------------------------------------------------------------------------------------------------------------------
# Lives
# ---------------------------------------------------------------------------------------------------------------------


def _lives(events: Iterable[Mapping[str, Any]], training: Figures, now: int) -> list[Life]:
    """All lives with what their events say of their times. Clocks of several hosts never run backwards here."""
    lives: list[Life] = []
    line = _first_line(training, now)
    times = [seconds_of(event.get("time")) for event in events]
    first = next((_ms(time) for time in times if math.isfinite(time)), None)
    # The first life of an older version may have written lines before its first event.
    if line is not None and (first is None or line < first):
        lives.append(Life(line, line))
    for event, time in zip(events, times, strict=True):
        known = lives[-1].end if lives else None
        if math.isfinite(time):
            _hear(lives, event, max(known or 0, min(now, _ms(time))), known)
        elif known is not None:
            _hear(lives, event, known, known)
    return lives


def _first_line(training: Figures, now: int) -> int | None:
    """When the steps of the first line began."""
    columns = [training.column(name) for name in ("time", "steps", "step", "step_s")]
    for time, said, step, step_s in zip(*columns, strict=True):
        if math.isfinite(time):
            return max(0, min(now, _ms(time - _seconds(said if math.isfinite(said) else step, step_s))))
    return None


def _seconds(count: float, step_s: float) -> float:
    """So many steps of so many seconds; 0 where that makes no sense."""
    seconds = count * step_s
    return seconds if 0 < seconds < _LONGEST_S else 0.0


def _hear(lives: list[Life], event: Mapping[str, Any], moment: int, known: int | None) -> None:
    """Take one event into the lives."""
    kind, step = event["kind"], number(event.get("step"))
    present = lives[-1] if lives else None
    if kind == "start":
        _start(lives, event, moment, known)
    elif kind == "exit":
        _exit(lives, event, moment)
    elif present is None or (kind in ("resume", "begin") and (present.resumed or not present.tells or present.over)):
        lives.append(Life(moment, moment, resumed=kind in ("resume", "begin"), first_step=_step(step)))
    elif not present.over:
        present.longest_silence = max(present.longest_silence, moment - present.end)
        present.end = moment
        if kind == "ready":
            present.ready, present.first_step = moment, _step(step)
        present.resumed |= kind in ("resume", "begin", "ready")
        if kind == "stop" and not present.tells:
            present.code, present.ended = ExitCode.PREEMPTED, f"stopped: {event.get('reason', '')}"


def _start(lives: list[Life], event: Mapping[str, Any], moment: int, known: int | None) -> None:
    launched = seconds_of(event.get("launched"))
    began = min(moment, _ms(launched)) if math.isfinite(launched) else moment
    lives.append(Life(max(began, known or 0), moment, token=str(event.get("life", "")), tells=True))


def _exit(lives: list[Life], event: Mapping[str, Any], moment: int) -> None:
    token = str(event.get("life", ""))
    named = [life for life in lives if life.token == token] if token else lives[-1:]
    if not named or named[-1].over:
        return
    life, code = named[-1], number(event.get("code"))
    life.code = int(code) if math.isfinite(code) else -1
    life.ended = f"{life.code}: {event.get('reason', '')}".removesuffix(": ")
    if life is lives[-1]:
        life.end = moment


def _step(step: float) -> int:
    return int(step) if math.isfinite(step) else 0


def _without_idle_ends(lives: list[Life], finished: bool) -> list[Life]:
    """Without last lives that only found the run finished: its wall time ended with it."""
    kept = list(lives)
    while finished and len(kept) > 1 and kept[-1].ready is None and kept[-1].tells and not kept[-1].steps:
        kept.pop()
    return kept


def _settle_last(life: Life, finished: bool, now: int) -> str:
    """The state of the run; a last life that lives is open until now."""
    if finished and (life.code in (None, 0)):
        life.ended = life.ended or _FINISHED
        return _FINISHED
    if life.over:
        return life.ended
    if now - life.end <= max(_SILENCE_MS, _SILENCES * life.longest_silence):
        life.end, life.ended = now, "running"
        return "running"
    life.ended = "silent"
    return "silent"


# ---------------------------------------------------------------------------------------------------------------------
# What the files state
# ---------------------------------------------------------------------------------------------------------------------


def _life_at(lives: list[Life], moment: int) -> int:
    return max(0, bisect_right([life.launched for life in lives], moment) - 1)


def _note_line(lives: list[Life], at: int, moment: int) -> None:
    """A line is a sign of life, unless the next life had begun or the end is known."""
    life = lives[at]
    if life.over or moment <= life.end:
        return
    life.longest_silence = max(life.longest_silence, moment - life.end)
    life.end = moment


def _hear_figures(lives: list[Life], stated: list[dict[str, int]], training: Figures, now: int) -> None:
    """Seconds of steps, and of waiting within them."""
    launches = [life.launched for life in lives]
    columns = [training.column(name) for name in ("time", "step", "steps", "step_s", "data_wait_s")]
    repeated = superseded(columns[1])
    before = 0.0
    for again, time, step, said, step_s, waited in zip(repeated, *columns, strict=True):
        moment = min(now, _ms(time)) if math.isfinite(time) else launches[-1]
        at = max(0, bisect_right(launches, moment) - 1)
        life = lives[at]
        # A line of an older version says only where the line before it, or its life, stood.
        since = max((known for known in (before, life.first_step) if known < step), default=step)
        count = said if math.isfinite(said) else step - since
        seconds = _seconds(count, step_s)
        _note_line(lives, at, moment)
        if life.first_work is None:
            life.first_work = max(life.launched, moment - _ms(seconds))
        if again:
            stated[at]["recomputed"] += _ms(seconds)
        else:
            waiting = min(waited, seconds) if waited > 0 else 0.0
            stated[at]["productive"] += _ms(seconds - waiting)
            stated[at]["data"] += _ms(waiting)
            life.steps += max(0, int(min(count, _LONGEST_S)))
        before = step


def _hear_evaluations(lives: list[Life], evaluations: Figures, now: int) -> None:
    for time in evaluations.column("time"):
        if math.isfinite(time):
            moment = min(now, _ms(time))
            _note_line(lives, _life_at(lives, moment), moment)


def _hear_events(
    lives: list[Life], stated: list[dict[str, int]], events: Iterable[Mapping[str, Any]], training: Figures, now: int
) -> None:
    """Stalls, evaluations and what was lost."""
    heard: set[str] = set()
    at = 0
    for event in events:
        kind, time = event["kind"], seconds_of(event.get("time"))
        if math.isfinite(time):
            at = max(at, _life_at(lives, min(now, _ms(time))))
        if kind == "save":
            # Of older versions the training waited for all of it.
            stated[at]["checkpoints"] += _duration(event, "stall_s" if "stall_s" in event else "seconds")
        elif kind == "eval":
            stated[at]["evaluation"] += _duration(event, "seconds")
        elif kind == "resume":
            _hear_loss(lives, stated, event, at, heard, now)
        elif kind == "rollback":
            stated[at]["recomputed"] += _duration(event, "seconds") + _lost_by_rollback(event, training)


def _hear_loss(
    lives: list[Life], stated: list[dict[str, int]], event: Mapping[str, Any], at: int, heard: set[str], now: int
) -> None:
    """What an earlier life did in vain belongs to it. A life that died while it resumed said so of the same lines."""
    until = str(event.get("lost_until", ""))
    if until and until in heard:
        return
    heard.add(until)
    moment = seconds_of(until)
    loser = _life_at(lives, min(now, _ms(moment))) if math.isfinite(moment) else at - 1
    loser = max(0, min(loser, at - 1))
    if at and math.isfinite(moment):
        _note_line(lives, loser, min(now, _ms(moment), lives[loser + 1].launched))
    if at:
        stated[loser]["recomputed"] += _duration(event, "lost_s")


def _lost_by_rollback(event: Mapping[str, Any], training: Figures) -> int:
    if "lost_s" in event:
        return _duration(event, "lost_s")
    steps = number(event.get("step")) - number(event.get("to_step"))
    seconds = sorted(value for value in training.column("step_s") if math.isfinite(value))
    if not (steps > 0 and seconds):
        return 0
    return _ms(_seconds(steps, seconds[len(seconds) // 2]))


# ---------------------------------------------------------------------------------------------------------------------
# The division
# ---------------------------------------------------------------------------------------------------------------------


def _divide(lives: list[Life], stated: list[dict[str, int]]) -> None:
    """Cut every life into its parts.

    What a life states beyond its own time is an earlier one's: an interval that a checkpoint carried over, or work
    lost since a checkpoint several lives ago.
    """
    over = dict.fromkeys(_STATED, 0)
    for index in range(len(lives) - 1, -1, -1):
        life = lives[index]
        before = lives[index - 1].end if index else life.launched
        if index and lives[index - 1].end > life.launched:
            # Two clocks: the earlier life ends where the later one begins.
            before = lives[index - 1].end = max(life.launched, lives[index - 1].launched)
        life.downtime = life.launched - before
        life.end = max(life.end, life.launched)
        life.parts["startup"] = min(life.work_began, life.end) - life.launched
        left = life.end - life.launched - life.parts["startup"]
        for part in _STATED:
            wanted = stated[index][part] + over[part]
            life.parts[part] = min(wanted, left)
            over[part] = wanted - life.parts[part] if part in ("productive", "recomputed") else 0
            left -= life.parts[part]
        life.parts["unaccounted"] = left
