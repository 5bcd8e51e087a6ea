"""The process of a job, `python -m launch.slurm.supervisor LAUNCH.json`: it starts the ranks, and decides what follows.

The job's script ends by becoming it, so that signals for the job reach it and no logic is left to a shell. What ranks
return through srun says little; how they ended stands in files, and what happened before in the ledger.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.record import Record
from launch.slurm import client
from launch.slurm.decide import Action, Decision, Facts, decide
from launch.slurm.job import Description
from launch.slurm.ledger import Ledger, Line, barren_lives, excluded_nodes, is_over, lines_of, unended
from launch.slurm.life import JobLife, LifeEnd, Signals
from rxt_dist.errors import ExitCode, UserError
from rxt_dist.files import lasting_errors, write_json_atomic
from rxt_dist.finished import is_finished
from rxt_dist.lives import file_identity
from rxt_dist.locks import held
from rxt_dist.train.events import iso_time, now

# SLURM takes a node that does not answer for dead after five minutes, and its ranks notice by themselves after as long.
_LOCK_SECONDS = 900.0
_BACK_OFF_SECONDS, _BACK_OFF_MOST = 1.0, 60.0
_REQUEUED_SECONDS = 150.0
_POLL_SECONDS = 0.2
_DOWN = ("down", "fail", "drain", "reboot", "unknown", "not_responding")
# As `Record.committed` gives them: name and inode.
Checkpoints = frozenset[tuple[str, int]]


class Supervisor:
    """The supervisor of one job, in one of the times that SLURM starts it."""

    def __init__(self, wanted: Description, environ: dict[str, str], signals: Signals) -> None:
        self.wanted, self.signals = wanted, signals
        self.job = job_name(environ)
        self.restart = int(environ.get("SLURM_RESTART_COUNT", "0"))
        self.folder = wanted.folder
        self.ledger = Ledger(self.folder.ledger)
        self.run = Path(wanted.run)
        self.record = Record(self.run)
        self.own = environ.get("SLURMD_NODENAME", os.uname().nodename)
        self.nodelist = environ["SLURM_JOB_NODELIST"]
        self.attempt = 0

    def supervise(self) -> int:
        """All lives in this job; the exit code of the job."""
        self._state("starting")
        if is_finished(self.run) and not self._goes_back():
            return self._end(Decision(Action.FINISHED, ExitCode.DONE, "the run is finished"))
        over = is_over(self._lines(), self.job)
        if over is not None:
            ended = f"job {over.get('job')} of this run ended with '{over.get('action')}'"
            say(f"not started: {ended}: {over.get('reason')}")
            return int(over.get("code") or 0)
        self._settle_the_last_life()
        hosts = client.host_names(self.nodelist)
        while True:
            decision = self._life(hosts)
            if decision.action is not Action.RESTART:
                return self._end(decision)
            self._pause()

    def _life(self, hosts: list[str]) -> Decision:
        """One life and what follows on it."""
        if self.signals.ended is not None:
            why = "the job was ended before its ranks were started"
            decision = Decision(Action.CANCELLED, 128 + self.signals.ended, why)
            # For the other jobs of a chain.
            self.ledger.add(
                "end", life=None, job=self.job, submission=self.wanted.submission, code=decision.code, reason=why,
                step=newest_step(self.record.committed()), progressed=False, blamed=[], excused=True,
                action=decision.action.value,
            )  # fmt: skip
            return decision
        if self.signals.user is not None:
            return Decision(Action.REQUEUE, ExitCode.PREEMPTED, "asked to stop before the ranks were started")
        if self._stop_is_asked():
            return Decision(Action.STOPPED, ExitCode.STOPPED, "a person stopped it")
        usable = self._usable(hosts)
        if usable is None:
            return Decision(Action.REQUEUE, ExitCode.UNAVAILABLE, "nodes are to be avoided, and too few are left")
        before, label = self.record.committed(), f"{self.job}.{self.restart}.{self.attempt}"
        life = JobLife(self.wanted, usable, label, self.restart + self.attempt, usable[0] == self.own, self.signals)
        self.attempt += 1
        self.ledger.add(
            "life", life=life.token, job=self.job, submission=self.wanted.submission, restart=self.restart,
            hosts=usable, ranks=life.ranks, checkpoint=newest_step(before),
        )  # fmt: skip
        self.record.new_life(life.token)
        end = self._lived(life)
        # Of a life that was killed the run itself has said nothing.
        self.record.ended(end.code, end.reason)
        if self.signals.user is not None:
            name = signal.Signals(self.signals.user).name.removeprefix("SIG")
            self.ledger.add(
                "signal", job=self.job, life=life.token, signal=name, received=iso_time(self.signals.user_time)
            )
        for host, problem in sorted(end.bad.items()):
            self.ledger.add("bad_node", host=host, problem=problem, life=life.token)
        if end.text:
            say(end.text)
        return self._decided(life, end, before, hosts)

    def _lived(self, life: JobLife) -> LifeEnd:
        """Check the nodes, wait for a life of this run that still runs elsewhere, run."""
        if self.wanted.preflight:
            self._state("checking nodes", life)
            problem = life.check_nodes()
            if problem is not None:
                return problem
        if not self._lock_is_free(life):
            text = f"another process still trains {self.run} ({self._holder()})"
            # Of another launch nobody knows when it ends; what is left of this one ends with its machine.
            code = ExitCode.UNAVAILABLE if self._holder_is_ours() else ExitCode.CONFIG
            return LifeEnd(code, text, f"error: {text}")
        if self.signals.user is not None or self.signals.ended is not None:
            return LifeEnd(ExitCode.PREEMPTED, "asked to stop before the ranks were started")
        self._state("running", life)
        return life.run(once=self._goes_back())

    def _decided(self, life: JobLife, end: LifeEnd, before: Checkpoints, hosts: list[str]) -> Decision:
        committed = self.record.committed()
        blamed = dict.fromkeys([*end.blamed, *(self._down(life.hosts) if self.signals.ended is not None else ())])
        progressed = bool(committed - before)
        # A job of one node that fails on one after the other is what is wrong itself.
        excused = end.code == ExitCode.PREEMPTED or (bool(end.bad) and len(life.hosts) > 1)
        line = {
            "life": life.token, "job": self.job, "submission": self.wanted.submission, "code": end.code,
            "reason": end.reason, "step": newest_step(committed), "begun": end.begun, "progressed": progressed,
            "blamed": list(blamed),
            "excused": excused or self.signals.user is not None,
        }  # fmt: skip
        barren = 0 if progressed else len(barren_lives([*self._lines(), {"kind": "end", **line}]))
        facts = Facts(
            is_finished(self.run) and not self._goes_back(),
            end.code,
            end.reason,
            self.signals.ended is not None,
            self._is_running(),
            self.signals.user is not None or end.overdue,
            barren,
            self._usable(hosts, (*end.blamed, *end.bad)) is not None,
        )
        decision = decide(facts)
        self.ledger.add("end", **line, action=decision.action.value, why=decision.why)
        return decision

    def _end(self, decision: Decision) -> int:
        """Do what was decided for the job; its exit code."""
        say(f"{decision.action}: {decision.why}")
        if decision.action is Action.REQUEUE:
            return self._requeue(decision)
        self._state(decision.action.value, code=decision.code, why=decision.why)
        if decision.action is Action.FAILED and decision.code == ExitCode.CRASH_LOOP:
            reasons = barren_lives(self._lines())
            say("error: what ended each life:\n" + "\n".join(f"  {reason}" for reason in reasons))
            say("Mend the cause, then `rxt-dist launch resume` goes on from the newest checkpoint.")
            self.record.gave_up(reasons)
        return int(decision.code)

    def _requeue(self, decision: Decision) -> int:
        if not self.wanted.requeue:
            self._state("ended", code=decision.code, why="the next job of its chain goes on, or `launch resume`")
            return int(decision.code)
        bad = excluded_nodes(self._lines())
        self._state("requeued", why=decision.why)
        if self.signals.ended is not None:
            # Since the look at the queue somebody has ended it, and SLURM would revive it.
            self._state("cancelled", code=decision.code, why="the job was ended before it could be requeued")
            return int(decision.code)
        try:
            client.requeue(self.job)
        except client.SlurmError as error:
            if self.signals.ended is None:
                self._state("failed", code=decision.code, why=str(error))
                say(f"error: the job cannot be requeued: {error} `rxt-dist launch resume {self.run}` goes on.")
            return int(decision.code)
        if bad:
            try:
                client.exclude(self.job, [*filter(None, [self.wanted.exclude]), *bad])
            except client.SlurmError as error:
                say(f"warning: {', '.join(bad)} may be given to the job again: {error}")
        # The end of this process comes from SLURM; one that leaves before would be a job that failed.
        end = time.monotonic() + _REQUEUED_SECONDS
        while self.signals.ended is None and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return int(decision.code)

    # -- what stands in the run directory ------------------------------------------------------------------------------

    def _goes_back(self) -> bool:
        """Whether a life goes back to an earlier checkpoint, as this was submitted to do once: no life has done so."""
        return bool(self.wanted.once) and not any(line.get("begun") for line in self._lines())

    def _lines(self) -> list[Line]:
        return lines_of(self.ledger.read(), self.wanted.submission)

    def _stop_is_asked(self) -> bool:
        return file_identity(self.run / "STOP") not in ("", self.wanted.old_stop)

    def _state(self, state: str, life: JobLife | None = None, **fields: Any) -> None:
        """What the job does now, for `launch status`. A disk without room is no reason to end it."""
        known = {"life": life.token, "hosts": life.hosts, "ranks": life.ranks} if life else {}
        value = {"state": state, "job": self.job, "restart": self.restart, "time": now(), **known, **fields}
        with suppress(OSError, UserError):
            write_json_atomic(self.folder.status, value)

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def _usable(self, hosts: list[str], also: tuple[str, ...] = ()) -> list[str] | None:
        """As many sound hosts as the run can work on; None: too few are left."""
        lines = self._lines()
        bad = set(excluded_nodes([*lines, {"kind": "end", "blamed": list(also)}]))
        sound = [host for host in hosts if host not in bad]
        count = next((count for count in self.wanted.node_counts if count <= len(sound)), 0)
        return sound[:count] or None

    def _settle_the_last_life(self) -> None:
        """Enter the end of a life whose supervisor was killed: with a node, by SLURM, or by whoever ended the job."""
        last = unended(self._lines())
        if last is None:
            return
        hosts = [str(host) for host in last.get("hosts", ())]
        down = self._down(hosts)
        step = newest_step(self.record.committed())
        reason = f"{', '.join(down)} failed" if down else "the job was ended from outside"
        self.ledger.add(
            "end", life=last["life"], job=last.get("job"), submission=self.wanted.submission, code=None, reason=reason,
            step=step, progressed=step > int(last.get("checkpoint", -1)), blamed=down, excused=True, action="restart",
        )  # fmt: skip

    def _down(self, hosts: list[str]) -> list[str]:
        """Those that SLURM has given up, or that do not answer it (a star behind the state)."""
        states = {host: state.lower() for host, state in client.node_states(hosts).items()}
        return [host for host in hosts if states.get(host, "").startswith(_DOWN) or states.get(host, "").endswith("*")]

    # -- the queue -----------------------------------------------------------------------------------------------------

    def _is_running(self) -> bool:
        """Whether SLURM still lets the job run. One that it is ending is none of ours any more."""
        if self.signals.ended is not None:
            return False
        try:
            state = client.job_state(self.job, patience=_BACK_OFF_MOST)
        except client.SlurmError as error:
            say(f"warning: {error}")
            return True
        return state is not None and state.state == "RUNNING"

    def _lock_is_free(self, life: JobLife) -> bool:
        """Wait until no other process trains the run, or this job is to stop: after a network failure the ranks of an
        earlier life may still run on a machine that SLURM does not reach."""
        end = time.monotonic() + _LOCK_SECONDS
        told = False
        while held(self.run / ".lock"):
            if not told:
                self._state("waiting", life, why=f"another process still trains the run: {self._holder()}")
                say(f"waiting: another process still trains {self.run} ({self._holder()})")
                told = True
            if self.signals.user is not None or self.signals.ended is not None:
                return True
            if not self._holder_is_ours() or time.monotonic() >= end:
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _holder_is_ours(self) -> bool:
        """Whether the process that trains the run is of one of its jobs."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            token = json.loads((self.run / "life.json").read_bytes())["life"]
            return any(line.get("life") == token for line in self.ledger.read() if line["kind"] == "life")
        return False

    def _holder(self) -> str:
        with suppress(OSError, ValueError, KeyError, TypeError):
            life = json.loads((self.run / "life.json").read_bytes())
            return f"life {life['life']}, process {life['pid']} on {life['host']}"
        return "unknown"

    def _pause(self) -> None:
        barren = len(barren_lives(self._lines()))
        seconds = min(_BACK_OFF_SECONDS * 2 ** max(0, barren - 1), _BACK_OFF_MOST)
        say(f"the ranks are started again in {seconds:g} s")
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.signals.ended is None and self.signals.user is None:
            time.sleep(_POLL_SECONDS)


def newest_step(committed: Checkpoints) -> int:
    """The step of the newest of these checkpoints; -1 where there is none."""
    return max((int(name.removeprefix("step-")) for name, _ in committed), default=-1)


def job_name(environ: dict[str, str]) -> str:
    """The job as commands name it: a job of an array by the array's id and its own number."""
    if "SLURM_ARRAY_JOB_ID" in environ:
        return f"{environ['SLURM_ARRAY_JOB_ID']}_{environ['SLURM_ARRAY_TASK_ID']}"
    return environ["SLURM_JOB_ID"]


def say(text: str) -> None:
    """A line of the job's output."""
    with suppress(OSError):
        print(f"{now()} {text}", file=sys.stderr, flush=True)


def main() -> int:
    """The supervisor of the job that this process is in."""
    signals = Signals()
    wanted = Description.read(Path(sys.argv[1]))
    signals.catch(signal.Signals[f"SIG{wanted.signal}"])
    supervisor = Supervisor(wanted, dict(os.environ), signals)
    try:
        with lasting_errors(supervisor.run):
            return supervisor.supervise()
    except UserError as error:
        say(f"error: {error}")
        return int(error.exit_code)


if __name__ == "__main__":
    sys.exit(main())
