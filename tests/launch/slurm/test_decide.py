"""What follows on the end of a life."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.local import CRASH_LOOP_RESTARTS
from launch.slurm.decide import Action, Facts, decide
from rxt_dist.errors import ExitCode

CRASH = Facts(finished=False, code=1, reason="a rank failed")
FINAL = (ExitCode.CONFIG, ExitCode.DATA, ExitCode.MEMORY, ExitCode.DISK, ExitCode.DIVERGED, ExitCode.CRASH_LOOP)


@pytest.mark.parametrize("code", [1, ExitCode.UNAVAILABLE, ExitCode.HANG, 128 + 9])
def test_crashes_start_again_where_they_are(code: int) -> None:
    assert decide(replace(CRASH, code=code)).action is Action.RESTART


@pytest.mark.parametrize("code", FINAL)
def test_what_another_start_cannot_mend_ends_the_job(code: int) -> None:
    for asked in (False, True):
        decision = decide(replace(CRASH, code=code, asked=asked))
        assert (decision.action, decision.code) == (Action.FAILED, code)


def test_a_preempted_job_goes_back_into_the_queue() -> None:
    for facts in (replace(CRASH, code=75), replace(CRASH, code=137, asked=True), replace(CRASH, code=75, asked=True)):
        decision = decide(facts)
        assert (decision.action, decision.code) == (Action.REQUEUE, ExitCode.PREEMPTED)


@pytest.mark.parametrize("code", [1, 75, 64, 137])
def test_a_job_that_was_ended_is_left_alone(code: int) -> None:
    assert decide(replace(CRASH, code=code, told_to_end=True)).action is Action.CANCELLED
    assert decide(replace(CRASH, code=code, running=False, asked=True)).action is Action.CANCELLED


def test_a_finished_run_is_finished_whatever_its_ranks_said() -> None:
    for facts in (replace(CRASH, code=137), replace(CRASH, told_to_end=True), replace(CRASH, code=75, asked=True)):
        assert decide(replace(facts, finished=True)).action is Action.FINISHED


def test_a_person_stops_for_good() -> None:
    decision = decide(replace(CRASH, code=ExitCode.STOPPED, asked=True))
    assert (decision.action, decision.code) == (Action.STOPPED, ExitCode.STOPPED)


def test_three_restarts_without_a_checkpoint_are_a_crash_loop() -> None:
    assert decide(replace(CRASH, barren=CRASH_LOOP_RESTARTS)).action is Action.RESTART
    decision = decide(replace(CRASH, barren=CRASH_LOOP_RESTARTS + 1))
    assert (decision.action, decision.code) == (Action.FAILED, ExitCode.CRASH_LOOP)


def test_too_few_sound_nodes_ask_for_others() -> None:
    assert decide(replace(CRASH, enough_nodes=False)).action is Action.REQUEUE
