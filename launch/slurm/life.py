"""One life of a run in a job: check the nodes, start the ranks, watch them to their end, and say how it came about."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import Popen
from types import FrameType
from typing import Any, cast

from launch.endings import ending_of
from launch.ranks import Rank, words_file
from launch.slurm.job import Description
from launch.slurm.network import choose_port
from launch.slurm.steps import Step, step_command, unreachable
from launch.slurm.task import read_exits
from launch.watching import RankEnd
from rxt_dist.errors import ExitCode
from rxt_dist.files import write_json_atomic
from rxt_dist.lives import Life
from rxt_dist.train.events import EventLog

_POLL_SECONDS = 0.1
# Imports of torch from a slow disk, on the slowest node.
_CHECK_SECONDS = 240.0
# Other nodes that are found bad at the same moment are named too.
_OTHERS_SECONDS = 3.0
# How a line of a check begins that is an answer (rxt_dist/node_check.py, which loads torch).
ANSWER = "rxt-node "
_LONGEST = 1000
# SLURM itself gives up on a node's answer after ten seconds or so.
_REACH_SECONDS = 30.0
# Ends by a signal that a machine may be the cause of: memory, bus, kill by the system.
_MACHINE = (-signal.SIGKILL, -signal.SIGBUS, -signal.SIGSEGV, -signal.SIGILL)
_SECRET = re.compile(r"JWT|TOKEN|KEY|SECRET|PASS|CREDENTIAL")
_RECORDED = ("SLURM_", "NCCL_", "GLOO_", "CUDA_", "OMP_", "MASTER_", "RXT_", "DS_", "TORCH", "TRITON", "FI_", "UCX_")


@dataclass
class Signals:
    """What the job's process was told; handlers only note it.

    user: the signal that asks for a checkpoint; user_at, user_time: when it came, on a clock that only goes forward and
    in seconds since the epoch. ended: TERM or INT: the job is to end, and stays ended.
    """

    user: int | None = None
    user_at: float = 0.0
    user_time: float = 0.0
    ended: int | None = None

    def catch(self, user: int) -> None:
        """Note signals from here on."""
        for number in {user, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP}:
            signal.signal(number, self._note_user)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note_end)

    def _note_user(self, number: int, frame: FrameType | None) -> None:
        if self.user is None:
            self.user, self.user_at, self.user_time = number, time.monotonic(), time.time()

    def _note_end(self, number: int, frame: FrameType | None) -> None:
        self.ended = number


@dataclass(frozen=True)
class LifeEnd:
    """How a life ended.

    code, reason: of the ranks. text: what to say of it. bad: nodes that failed their check, and why. blamed: nodes at
    which it failed. overdue: ranks did not end in time after the user signal. begun: it had taken the run.
    """

    code: int
    reason: str
    text: str = ""
    bad: dict[str, str] = field(default_factory=dict)
    blamed: tuple[str, ...] = ()
    overdue: bool = False
    begun: bool = False


class JobLife:
    """A life on some of the nodes of a job; `token` names it.

    Args:
        label: of the job and this life, for ports.
        here: whether the first host is this machine.
    """

    def __init__(
        self, wanted: Description, hosts: Sequence[str], label: str, attempt: int, here: bool, signals: Signals
    ) -> None:
        self.token = uuid.uuid4().hex[:12]
        self.hosts = list(hosts)
        self.ranks = len(hosts) * wanted.ranks_per_node
        self._wanted, self._label, self._here, self._signals = wanted, label, here, signals
        self.folder = wanted.folder.life(self.token)
        self._request = self.folder / "stop"
        self._life = Life(self.token, time.time(), attempt, None, wanted.old_stop, None, self._request)

    def check_nodes(self) -> LifeEnd | None:
        """Check all nodes; None: they are sound. A node's own problem is its name and a sentence."""
        self.folder.mkdir(parents=True, exist_ok=True)
        answers: dict[str, dict[str, Any]] = {}
        step = self._start("check", listen=lambda line: _hear(line, answers))
        deadline = time.monotonic() + _CHECK_SECONDS
        while not step.ended and time.monotonic() < deadline and not self._is_asked():
            if any(answer["problems"] for answer in list(answers.values())):
                deadline = min(deadline, time.monotonic() + _OTHERS_SECONDS)
            time.sleep(_POLL_SECONDS)
        ended_by_itself = step.ended
        step.end()
        write_json_atomic(self.folder / "nodes.json", dict(answers))
        return self._verdict(dict(answers), ended_by_itself)

    def _is_asked(self) -> bool:
        return self._signals.user is not None or self._signals.ended is not None

    def _verdict(self, answers: dict[str, dict[str, Any]], ended_by_itself: bool) -> LifeEnd | None:
        bad = {host: "; ".join(answer["problems"]) for host, answer in answers.items() if answer["problems"]}
        silent = [host for host in self.hosts if host not in answers]
        if not bad and silent and self._is_asked():
            return LifeEnd(ExitCode.PREEMPTED, "asked to stop while the nodes were checked")
        if not bad and silent:
            # A step whose start fails on one node ends on all of them before they can answer.
            gone = unreachable(silent, _REACH_SECONDS) if ended_by_itself else silent
            bad = dict.fromkeys(gone, "does not answer")
            if not bad and answers:
                bad = dict.fromkeys(silent, "the check does not start there: is a disk missing, or a package?")
        if bad:
            said = "\n".join(f"  {host}: {problem}" for host, problem in sorted(bad.items()))
            # Where all of several fail, it is not the nodes.
            avoided = bad if len(bad) < len(self.hosts) or len(bad) == 1 else {}
            reason = f"bad nodes: {'; '.join(f'{host}: {problem}' for host, problem in sorted(bad.items()))}"
            return LifeEnd(ExitCode.UNAVAILABLE, reason[:_LONGEST], f"bad nodes:\n{said}", avoided)
        if silent:
            reason = f"{', '.join(silent)} did not answer the check of nodes"
            return LifeEnd(ExitCode.UNAVAILABLE, reason, reason)
        apart = {host: answer.get("problem_together") or "still waits" for host, answer in answers.items()
                 if not answer["together"]}  # fmt: skip
        if not apart:
            return None
        said = "\n".join(f"  {host}: {problem}" for host, problem in sorted(apart.items()))
        return LifeEnd(ExitCode.UNAVAILABLE, "the nodes cannot compute together", f"nodes do not meet:\n{said}")

    def run(self, once: bool) -> LifeEnd:
        """Start the ranks and wait until all have ended."""
        self.folder.mkdir(parents=True, exist_ok=True)
        role = "rank" if self._wanted.launcher == "srun" else "agent"
        self._record()
        step = self._start(role, {"RXT_ONCE": "1"} if once else {})
        overdue = self._wait(step)
        exits = read_exits(self.folder, self.ranks)
        step.end()
        return self._ending(exits, overdue)

    def _wait(self, step: Step) -> bool:
        """Until all ranks have ended; whether they took too long after they were asked to."""
        asked, patience = False, max(self._wanted.lead - 30, self._wanted.lead / 2)
        while not step.ended:
            # A job that is to end is ended by SLURM; what its ranks can still save they save.
            wished = self._signals.user or self._signals.ended
            if wished is not None and not asked:
                asked = True
                with suppress(OSError):  # there is the signal, too
                    self._request.touch()
                # torchrun and containers do not pass it on but end by it: for them there is the file.
                if self._signals.user and self._wanted.launcher == "srun" and not self._wanted.contained:
                    step.pass_on(self._signals.user)
            if self._signals.user is not None and time.monotonic() > self._signals.user_at + patience:
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def _start(
        self, role: str, more: dict[str, str] | None = None, listen: Callable[[str], None] | None = None
    ) -> Step:
        port = choose_port(f"{self._label}.{role}", self._here)
        environment = {
            **os.environ,
            **self._life.environment(),
            "MASTER_ADDR": self.hosts[0],
            "MASTER_PORT": str(port),
            # The output of a job is read while it grows.
            "PYTHONUNBUFFERED": "1",
            **(more or {}),
        }
        return Step(step_command(self._wanted, role, self.hosts, self.folder), environment, self.hosts, listen)

    def _record(self) -> None:
        """The environment that ranks inherit, without what may be secret."""
        known = {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_RECORDED) and not _SECRET.search(name)
        }
        paths = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "LOADEDMODULES") if name in os.environ}
        write_json_atomic(self.folder / "environment.json", {"hosts": self.hosts, "variables": known | paths})

    def _ending(self, exits: dict[int, dict[str, Any]], overdue: bool) -> LifeEnd:
        run = Path(self._wanted.run)
        events = _events_of(run, self.token)
        ends = [
            RankEnd(
                Rank(rank, cast("Popen[bytes]", None), words_file(self.folder, rank), self.folder / f"output-{rank}"),
                int(how["code"]),
                float(how["at"]),
            )
            for rank, how in sorted(exits.items(), key=lambda item: item[1]["at"])
        ]
        told = _told(events)
        ending = ending_of(ends, run / "logs" if events else None)
        code, reason, text = int(ending.code), ending.reason, ending.text
        lost = sorted({self.hosts[rank // self._wanted.ranks_per_node] for rank in range(self.ranks)} - _seen(exits))
        if code == ExitCode.DONE and len(exits) < self.ranks:
            code, reason = ExitCode.CRASH, f"nothing is known of the ranks on {', '.join(lost) or 'some nodes'}"
            text = reason
        if told is not None and (not ends or code in (told[0], ExitCode.CRASH)):
            code, reason = told
        blamed = {str(how["host"]) for how in exits.values() if how["code"] in _MACHINE} | _hung_hosts(events)
        # The run knows machines by the names that they have for themselves.
        here = [host for host in self.hosts if host.split(".")[0] in {name.split(".")[0] for name in blamed}]
        return LifeEnd(code, reason, text, {}, tuple(sorted(here)), overdue, bool(events))


def _hear(line: str, answers: dict[str, dict[str, Any]]) -> None:
    """Take up a line of a check: an answer, or what a library says."""
    if not line.startswith(ANSWER):
        print(line, end="", file=sys.stderr, flush=True)
        return
    with suppress(ValueError, KeyError):
        answer = json.loads(line.removeprefix(ANSWER))
        answers[answer["host"]] = answer


def _seen(exits: dict[int, dict[str, Any]]) -> set[str]:
    return {str(how["host"]) for how in exits.values()}


def _events_of(run: Path, token: str) -> list[dict[str, Any]]:
    """What the run has written since this life began."""
    try:
        events = EventLog(run / "events.jsonl").read()
    except OSError:
        return []
    starts = [at for at, event in enumerate(events) if event["kind"] == "start" and event.get("life") == token]
    return events[starts[-1] :] if starts else []


def _told(events: Sequence[dict[str, Any]]) -> tuple[int, str] | None:
    """Code and reason that the run itself gives for the end of this life."""
    exits = [event for event in events if event["kind"] == "exit"]
    return (int(exits[-1]["code"]), str(exits[-1].get("reason"))) if exits else None


def _hung_hosts(events: Sequence[dict[str, Any]]) -> set[str]:
    return {str(event["host"]) for event in events if event["kind"] == "hang" and event.get("host")}
