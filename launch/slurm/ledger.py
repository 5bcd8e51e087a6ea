"""What happened in the jobs of a run: an account of our own, because many clusters keep none.

One line of `job/ledger.jsonl` for each of

    submitted   submission, job
    life        life, job, submission, restart (of the job), hosts, ranks, checkpoint (step)
    signal      job, life, signal, received (when)
    bad_node    host, problem, life
    end         life, job, submission, code, reason, step, begun, progressed, blamed (hosts), excused, action

From it the supervisor knows what to do next: which nodes to avoid, whether lives still make progress, and whether a
person or an error has put an end to a submission.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rxt_dist.errors import DiskError
from rxt_dist.train.events import append_line, now, read_lines

# A node at which a life failed so often is avoided.
FAILURES_OF_A_BAD_NODE = 2

Line = Mapping[str, Any]


class Ledger:
    """The account of one run. What a full disk has no room for is kept until there is some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: list[dict[str, Any]] = []

    def add(self, kind: str, **fields: Any) -> None:
        """Add one line."""
        self._held.append({"time": now(), "kind": kind, **fields})
        with suppress(OSError, DiskError):
            while self._held:
                append_line(self.path, self._held[0])
                del self._held[0]

    def read(self) -> list[dict[str, Any]]:
        """All lines."""
        return [line for line in read_lines(self.path) if isinstance(line.get("kind"), str)] + self._held


def lines_of(lines: Sequence[Line], submission: int) -> list[Line]:
    """The lines since a submission was made, or taken up again by a person; where that line was lost, since the first
    that is of it."""
    own = [at for at, line in enumerate(lines) if line.get("submission") == submission]
    starts = [at for at in own if _is(lines[at], "submitted")]
    return list(lines[starts[-1] :]) if starts else list(lines[own[0] :]) if own else []


def excluded_nodes(lines: Sequence[Line]) -> list[str]:
    """Nodes that failed a check, or at which lives failed twice; in order of their names."""
    failures: Counter[str] = Counter()
    for line in lines:
        if _is(line, "bad_node"):
            failures[str(line.get("host"))] += FAILURES_OF_A_BAD_NODE
        if _is(line, "end"):
            failures.update(map(str, line.get("blamed", ())))
    return sorted(host for host, count in failures.items() if count >= FAILURES_OF_A_BAD_NODE)


def barren_lives(lines: Sequence[Line]) -> list[str]:
    """What ended the last lives in a row that made no checkpoint and had no excuse, as a preemption is."""
    reasons: list[str] = []
    for line in reversed([line for line in lines if _is(line, "end")]):
        if line.get("progressed"):
            break
        if not line.get("excused"):
            reasons.append(f"{line.get('code')}: {line.get('reason')}")
    return reasons[::-1]


def unended(lines: Sequence[Line]) -> Line | None:
    """The last life, if nothing says how it ended: its supervisor was killed with it."""
    lives = [line for line in lines if line["kind"] in ("life", "end")]
    return lives[-1] if lives and _is(lives[-1], "life") else None


def is_over(lines: Sequence[Line], job: str) -> Line | None:
    """What put an end to a submission before this job, so that the rest of a chain has nothing to do."""
    ends = [line for line in lines if _is(line, "end")]
    over = bool(ends) and ends[-1].get("action") in ("failed", "stopped", "cancelled") and ends[-1].get("job") != job
    return ends[-1] if over else None


def _is(line: Line, kind: str) -> bool:
    return line.get("kind") == kind
