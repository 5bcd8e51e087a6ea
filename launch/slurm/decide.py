"""What follows on the end of a life: one table, without SLURM in it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from launch.local import CRASH_LOOP_RESTARTS
from rxt_dist.errors import ExitCode, may_start_again


class Action(StrEnum):
    """What the supervisor does next."""

    FINISHED = "finished"
    CANCELLED = "cancelled"  # somebody has ended the job: it is left alone
    STOPPED = "stopped"  # a person made the STOP file
    FAILED = "failed"
    RESTART = "restart"  # on the nodes that the job has
    REQUEUE = "requeue"


@dataclass(frozen=True)
class Facts:
    """How a life ended, and what the job may still do.

    finished: the run is trained and evaluated. code, reason: of the ranks. told_to_end: the job's own process got TERM.
    running: SLURM has not ended the job meanwhile. asked: the signal came that asks for a checkpoint. barren: lives in
    a row, this one included, that made no checkpoint and had no excuse. enough_nodes: as many sound nodes are left of
    this job as the run can work on.
    """

    finished: bool
    code: int
    reason: str
    told_to_end: bool = False
    running: bool = True
    asked: bool = False
    barren: int = 0
    enough_nodes: bool = True


@dataclass(frozen=True)
class Decision:
    """What to do, the exit code of a job that ends with it, and why."""

    action: Action
    code: int
    why: str


def decide(facts: Facts) -> Decision:
    """The first that holds, from top to bottom."""
    if facts.finished:
        return Decision(Action.FINISHED, ExitCode.DONE, "the run is finished")
    if facts.told_to_end or not facts.running:
        return Decision(Action.CANCELLED, facts.code, "SLURM has ended the job: it goes on only if SLURM requeues it")
    if facts.code == ExitCode.DONE:
        return Decision(Action.FINISHED, ExitCode.DONE, facts.reason)
    if facts.code == ExitCode.STOPPED:
        return Decision(Action.STOPPED, facts.code, "a person stopped it")
    if not may_start_again(facts.code):
        return Decision(Action.FAILED, facts.code, f"{facts.reason}: another start would end the same way")
    if facts.asked or facts.code == ExitCode.PREEMPTED:
        return Decision(Action.REQUEUE, ExitCode.PREEMPTED, "its time is over, or its nodes are wanted for another job")
    if facts.barren > CRASH_LOOP_RESTARTS:
        why = f"{CRASH_LOOP_RESTARTS} restarts made no new checkpoint"
        return Decision(Action.FAILED, ExitCode.CRASH_LOOP, why)
    if not facts.enough_nodes:
        return Decision(Action.REQUEUE, facts.code, "a node is to be avoided, and too few are left")
    return Decision(Action.RESTART, facts.code, facts.reason)
