"""Where wall time went: logs whose answer is known, and logs of any kind, whose parts always sum to the wall time."""

from __future__ import annotations

import json
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from run_logs import Log, at, moment

from rxt_dist.errors import ConfigError
from rxt_dist.report.goodput import PARTS, goodput, superseded


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "a-run")


def parts(log: Log, now: float) -> dict[str, float]:
    """Parts that are not 0."""
    found = goodput(log.path, moment(now))
    assert round(1000 * sum(found.seconds.values())) == round(1000 * found.wall_s)
    return {part: seconds for part, seconds in found.seconds.items() if seconds}


def first_life(log: Log) -> Log:
    """100 s: 20 of start-up, 40 steps of 1.5 s of which 4 s waited, a save of 2 s, an evaluation of 5 s; 13 s left."""
    log.event(3, "start", life="a", ranks=2, launched=at(0), attempt=0)
    log.event(20, "ready", step=0, seconds=20)
    log.line(52, 20, steps=20, step_s=1.5, data_wait_s=1.0)
    log.event(54, "save", step=20, path="step-20", bytes=9, seconds=8.0, stall_s=2.0)
    log.event(60, "eval", step=20, sources=1, seconds=5.0)
    return log.line(90, 40, steps=20, step_s=1.5, data_wait_s=3.0)


FIRST = {"startup": 20, "productive": 56, "data": 4, "checkpoints": 2, "evaluation": 5, "unaccounted": 13}


def test_a_life_that_ended(log: Log) -> None:
    first_life(log).event(100, "exit", code=75, reason="SIGTERM", step=40, life="a")
    assert parts(log, 5000) == FIRST
    found = goodput(log.path, moment(5000))
    assert (found.wall_s, found.state) == (100, "75: SIGTERM")
    assert found.share["productive"] == 0.56
    assert [(life.steps, life.code) for life in found.lives] == [(40, 75)]


def test_a_life_that_lives_is_open_until_now(log: Log) -> None:
    """And one of which nothing was heard for long ended with its last line."""
    first_life(log)
    assert parts(log, 100) == FIRST
    assert goodput(log.path, moment(100)).state == "running"
    assert parts(log, 90 + 599)["unaccounted"] == 13 + 589
    assert goodput(log.path, moment(90 + 601)).wall_s == 90
    assert goodput(log.path, moment(90 + 601)).state == "silent"


def test_a_kill_loses_what_came_after_the_checkpoint(log: Log) -> None:
    """The lines are gone; the event of the resume says what they held, and until when that life lived."""
    log.event(3, "start", life="a", ranks=2, launched=at(0), attempt=0).event(20, "ready", step=0)
    log.line(52, 20, steps=20, step_s=1.5)
    log.event(130, "start", life="b", ranks=2, launched=at(120), attempt=1)
    log.event(140, "resume", step=20, seconds=4, lost_steps=20, lost_s=30.0, lost_until=at(90))
    log.event(141, "ready", step=20)
    log.line(175, 40, steps=20, step_s=1.5)
    log.event(176, "finish", step=40).event(177, "exit", code=0, reason="", life="b")
    # Before the kill 20 + 30 + 30 of 90 s; 30 s nobody lived; then 21 + 30 of 57 s.
    expected = {"startup": 41, "productive": 60, "recomputed": 30, "downtime": 30, "unaccounted": 16}
    assert parts(log, 999) == expected
    assert goodput(log.path, moment(999)).state == "finished"


def test_a_life_that_dies_while_it_resumes_says_the_same_loss_once_more(log: Log) -> None:
    log.event(1, "start", life="a", launched=at(0)).event(10, "ready", step=0)
    for life, time in (("b", 100), ("c", 200)):
        log.event(time + 1, "start", life=life, launched=at(time))
        log.event(time + 5, "resume", step=0, lost_steps=30, lost_s=30.0, lost_until=at(50))
    log.event(210, "exit", code=0, life="c")
    assert parts(log, 999)["recomputed"] == 30


def test_work_lost_since_an_old_checkpoint_is_of_several_lives(log: Log) -> None:
    """A life begun from far back drops lines of all lives since; what one life has no room for is an earlier one's."""
    log.event(0, "start", life="a", launched=at(0)).event(0, "ready", step=0)
    log.event(40, "exit", code=75, life="a")
    log.event(50, "start", life="b", launched=at(50)).event(50, "ready", step=40)
    log.event(80, "exit", code=75, life="b")
    log.event(90, "start", life="c", launched=at(90))
    log.event(90, "resume", step=10, lost_s=60.0, lost_until=at(80)).event(90, "ready", step=10)
    log.event(91, "exit", code=75, life="c")
    assert parts(log, 999) == {"recomputed": 60, "downtime": 20, "unaccounted": 11}


def test_a_rollback_loses_steps(log: Log) -> None:
    """What its event says, or so many steps of the usual length."""
    log.event(0, "start", life="a", launched=at(0)).event(0, "ready", step=0)
    log.line(20, 10, steps=10, step_s=2.0)
    log.event(60, "rollback", step=30, to_step=15, seconds=3.0)
    assert parts(log, 100) == {"productive": 20, "recomputed": 33, "unaccounted": 47}
    log.event(90, "rollback", step=30, to_step=15, seconds=1.0, lost_s=6.0)
    assert parts(log, 100)["recomputed"] == 40


def test_lines_that_stand_twice_are_recomputed_work(log: Log) -> None:
    log.event(0, "start", life="a", launched=at(0)).event(0, "ready", step=0)
    for time, step in ((10, 10), (20, 20), (30, 20)):
        log.line(time, step, steps=10, step_s=1.0)
    assert parts(log, 30) == {"productive": 20, "recomputed": 10}
    assert superseded([1, 2, 3, 2, 3, 4]) == [False, True, True, False, False, False]


def test_logs_of_older_versions(log: Log) -> None:
    """No starts, no exits, no `steps`: lives begin with their resumes, and a save held the training up."""
    log.line(10, 10, step_s=1.0)
    log.event(12, "save", step=10, seconds=2.0)
    log.line(22, 20, step_s=1.0)
    log.event(23, "stop", step=20, reason="SIGTERM")
    log.event(50, "changed", setting="a").event(51, "resume", step=20)
    log.line(61, 30, step_s=1.0)
    log.event(61, "finish", step=30)
    assert parts(log, 999) == {"productive": 30, "checkpoints": 2, "downtime": 28, "unaccounted": 1}
    assert goodput(log.path, moment(999)).state == "finished"
    assert [life.steps for life in goodput(log.path, moment(999)).lives] == [20, 10]


def test_a_finished_run_that_began_again_at_an_older_checkpoint_is_not_finished(log: Log) -> None:
    first_life(log).event(99, "finish", step=40).event(100, "exit", code=0, life="a")
    log.event(200, "start", life="b", launched=at(190)).event(210, "ready", step=20, seconds=20)
    assert goodput(log.path, moment(212)).state == "running"
    log.event(220, "exit", code=137, reason="rank 0 was killed", life="b")
    assert goodput(log.path, moment(999)).state == "137: rank 0 was killed"


def test_a_finished_run_that_is_started_again_has_no_more_wall_time(log: Log) -> None:
    first_life(log).event(99, "finish", step=40).event(100, "exit", code=0, life="a")
    (log.path / "finished.json").write_text('{"step": 40}')
    log.event(900, "start", life="b", launched=at(890)).event(901, "exit", code=0, life="b")
    assert parts(log, 5000) == FIRST


def test_clocks_of_two_hosts_and_of_the_reader(log: Log) -> None:
    """A later life whose clock is behind begins where the earlier one ended; nothing is later than now."""
    first_life(log).event(100, "exit", code=75, life="a")
    log.event(80, "start", life="b", launched=at(70)).event(85, "ready", step=40)
    log.line(90, 50, steps=10, step_s=1.0)
    assert sum(parts(log, 200).values()) == goodput(log.path, moment(200)).wall_s
    assert goodput(log.path, moment(-50)).wall_s == 0


DAY = 86_400


def three_lives(folder: Path, wrong: int, by: float) -> Log:
    """Three lives of 100 s each, 10 s apart, of which the clock of one was wrong; the second lost 20 s of the first."""
    log = Log(folder / f"run-{wrong}-{by}")
    for number in range(3):
        begun = 110 * number + by * (number == wrong)
        lost = {"lost_s": 20.0, "lost_until": at(95 + by * (wrong == 0))} if number == 1 else {}
        log.event(begun + 5, "start", life=str(number), launched=at(begun))
        log.event(begun + 10, "resume", step=20 * number, **lost)
        log.event(begun + 20, "ready", step=20 * number)
        for step in (10, 20):
            log.line(begun + 20 + 3 * step, 20 * number + step, steps=10, step_s=3.0)
        log.event(begun + 90, "save", step=20 * number + 20, seconds=4.0, stall_s=2.0)
        log.event(begun + 100, "exit", code=75, life=str(number))
    return log


AHEAD, BEHIND = (DAY, 3 * 365 * DAY), (-DAY, -40 * 365 * DAY)


@pytest.mark.parametrize(("wrong", "by"), [*product((0, 1, 2), AHEAD), *product((1, 2), BEHIND)])
def test_a_clock_that_was_a_day_ahead_or_behind_in_one_life(tmp_path: Path, wrong: int, by: float) -> None:
    """Parts of lives are those of a right clock; how long nobody lived beside the wrong one, nobody knows. A first life
    whose clock was behind is left out, as it could as well have waited so long for the second one."""
    wanted = parts(three_lives(tmp_path, 0, 0), 400)
    found = parts(three_lives(tmp_path, wrong, by), 400)
    assert wanted.pop("downtime") == 20
    assert 0 <= found.pop("downtime", 0) <= 100
    assert found == wanted


def test_one_event_of_a_wrong_clock_moves_nothing_else(log: Log) -> None:
    first_life(log).event(DAY + 91, "skip", step=41).event(100, "exit", code=75, reason="SIGTERM", step=40, life="a")
    assert parts(log, 5 * DAY) == FIRST


def test_nothing_yet(log: Log) -> None:
    assert (goodput(log.path, moment(0)).state, parts(log, 0)) == ("empty", {})
    assert not any(goodput(log.path, moment(0)).share.values())
    log.raw("events.jsonl", '{"time": "2026-03-0').raw("metrics.jsonl", "\x00\x00")
    assert goodput(log.path, moment(0)).state == "empty"
    with pytest.raises(ConfigError, match="not a run directory"):
        goodput(log.path / "nowhere", 0)


NUMBERS = st.one_of(
    st.integers(-5, 400), st.floats(-1, 400), st.sampled_from([None, "x", [], 1e300, float("nan"), True])
)
TIMES = st.one_of(st.floats(-100, 1000).map(at), st.sampled_from([None, "yesterday", 7, at(5), at(1e8)]))
KINDS = st.sampled_from(
    ["start", "resume", "begin", "ready", "save", "eval", "rollback", "stop", "exit", "finish", "x"]
)
FIELDS = ("step", "seconds", "stall_s", "lost_s", "to_step", "code", "steps", "step_s", "data_wait_s")
ENTRIES = st.fixed_dictionaries(
    {"time": TIMES, "kind": KINDS},
    optional=dict.fromkeys(FIELDS, NUMBERS)
    | {"launched": TIMES, "lost_until": TIMES, "life": st.sampled_from("ab"), "eval/x": NUMBERS},
)


@given(st.lists(ENTRIES, max_size=12), st.lists(ENTRIES, max_size=12), st.floats(-200, 2000), st.booleans())
@settings(max_examples=120, deadline=None)
@pytest.mark.slow
def test_the_parts_of_any_logs_sum_to_the_wall_time(
    events: list[dict[str, Any]], lines: list[dict[str, Any]], now: float, torn: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder))
        for name, entries in (("events.jsonl", events), ("metrics.jsonl", lines)):
            text = "\n".join(json.dumps(entry) for entry in entries) + "\n"
            log.raw(name, text[:-3] if torn else text)
        found = goodput(log.path, moment(now))
    assert set(found.seconds) == set(PARTS)
    assert all(seconds >= 0 for seconds in found.seconds.values())
    assert sum(round(1000 * seconds) for seconds in found.seconds.values()) == round(1000 * found.wall_s)
    json.dumps(found.as_json(), allow_nan=False)
