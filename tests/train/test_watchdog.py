"""The watchdog by itself: deadlines, pauses, which rank is late. Real processes: tests/faults/test_hang.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rxt_dist.config.run import DeadlinesConfig
from rxt_dist.train import watchdog as module
from rxt_dist.train.events import EventLog
from rxt_dist.train.watchdog import Said, Surroundings, Watchdog, collective_timeout, late_rank

ENDLESS = DeadlinesConfig(set_up=0, load=0, data=0, step=0, save=0, evaluate=0)


class Exits:
    """In place of the process's end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()
        monkeypatch.setattr(module.os, "_exit", self._exit)

    def _exit(self, code: int) -> None:
        self.codes.append(int(code))
        self.happened.set()
        raise SystemExit


# In a test the thread whose process would be over goes on, and ends by this.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


def place(folder: Path, rank: int = 0, ranks: int = 1, channel: Any = None) -> Surroundings:
    return Surroundings(
        rank, [f"node{rank}" for rank in range(ranks)], folder / "logs", EventLog(folder / "e"), channel
    )


class Store:
    """What torch's store does, in one process; `silent`: it does not answer."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.silent = False
        self.fails = False

    def _answer(self) -> None:
        if self.fails:
            raise RuntimeError("connection reset")
        while self.silent:
            time.sleep(0.01)

    def set(self, key: str, value: str) -> None:
        self._answer()
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self._answer()
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self._answer()
        return all(key in self.values for key in keys)

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        self._answer()
        assert expected_value == ""
        return self.values.setdefault(key, desired_value.encode())


def test_a_rank_alone_that_hangs_leaves_its_stacks_and_ends(tmp_path, monkeypatch, capfd):
    exits = Exits(monkeypatch)
    limits = ENDLESS.model_copy(update={"data": 0.1})
    with Watchdog(limits, place(tmp_path)) as watchdog, watchdog.phase("data", 7):
        assert exits.happened.wait(5)
    assert exits.codes == [87]
    assert "test_watchdog" in (tmp_path / "logs/stacks-rank-0.txt").read_text()
    (event,) = EventLog(tmp_path / "e").read()
    assert (event["kind"], event["phase"], event["rank"], event["host"], event["step"]) == (
        "hang",
        "data",
        0,
        "node0",
        7,
    )
    assert "rank 0 on node0 does not come on in phase 'data' of step 7" in capfd.readouterr().err


def test_phases_within_their_deadlines_and_phases_without_one_do_not_end_it(tmp_path, monkeypatch):
    exits = Exits(monkeypatch)
    limits = ENDLESS.model_copy(update={"step": 0.2})
    with Watchdog(limits, place(tmp_path)) as watchdog:
        for step in range(5):
            with watchdog.phase("step", step):
                time.sleep(0.1)
        with watchdog.phase("save"):
            time.sleep(0.4)
        time.sleep(0.3)
    assert exits.codes == []


def test_the_deadline_of_a_step_is_learnt_from_the_last_ones(tmp_path):
    with Watchdog(ENDLESS.model_copy(update={"step": 0.1}), place(tmp_path)) as watchdog:
        assert watchdog.deadline("step") == 0.1
        for step in range(5):
            with watchdog.phase("step", step):
                time.sleep(0.05)
    assert 0.4 <= watchdog.deadline("step") < 2
    assert watchdog.deadline("set-up") == 0


def test_time_in_which_the_whole_process_stood_still_does_not_count(tmp_path):
    """Stopped for two seconds, with a deadline of one."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from rxt_dist.config.run import DeadlinesConfig\n"
        "from rxt_dist.train.events import EventLog\n"
        "from rxt_dist.train.watchdog import Surroundings, Watchdog\n"
        "where = Path(sys.argv[1])\n"
        "place = Surroundings(0, ['here'], where, EventLog(where / 'e'), None)\n"
        "with Watchdog(DeadlinesConfig(data=1), place) as dog:\n"
        "    with dog.phase('data'):\n"
        "        print('ready', flush=True); time.sleep(0.7)\n"
        "    print('fine', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    os.kill(process.pid, 19)
    time.sleep(2)
    os.kill(process.pid, 18)
    assert process.communicate(timeout=20)[0] == "fine\n"
    assert process.returncode == 0


def said(phase: str, changes: int, seconds: float = 0.0, limit: float = 0.0) -> Said:
    return Said(7, phase, 5, changes, seconds, limit)


LATE = said("step", 9, seconds=11, limit=10)


@pytest.mark.parametrize(
    ("own", "other", "silence", "late"),
    [
        pytest.param(LATE, LATE, 0, 0, id="all in one phase: the one that asks"),
        pytest.param(LATE, said("step", 9, 1, 10), 0, None, id="just come to where the other waited"),
        pytest.param(LATE, LATE, 8, 1, id="silent for as long as a stop takes"),
        pytest.param(LATE, None, 8, 1, id="never said anything"),
        pytest.param(LATE, None, 2, None, id="has not said anything yet"),
        pytest.param(LATE, said("data", 7, 20, 15), 0, 1, id="behind and overdue"),
        pytest.param(LATE, said("data", 7, 14, 15), 0, None, id="behind, and only slow"),
        pytest.param(LATE, said("data", 7, 14, 0), 0, None, id="behind, and may be for ever"),
        pytest.param(LATE, said("data", 7, 9, 15), 4, None, id="its interpreter is held up, its deadline not passed"),
        pytest.param(LATE, said("data", 7, 13, 15), 4, 1, id="silent, and its deadline passed meanwhile"),
        pytest.param(LATE, said("data", 11, 1, 15), 0, 0, id="the one that asks is behind, back in a phase before"),
        pytest.param(said("boundary", 9, 11, 10), said("evaluate", 8, 11, 99), 0, None, id="back from an inner phase"),
    ],
)
def test_the_late_rank(own, other, silence, late):
    found = late_rank({0: own, 1: other}, {1: silence}, asking=0, patience=7.5, least=3)
    assert (found and found[0]) == late


class Machine:
    """Ranks, their store and a clock that goes on when told to: no threads. Beats are a second apart."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, ranks: int = 2, **limits: float) -> None:
        self.now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))
        self.store = Store()
        deadlines = ENDLESS.model_copy(update=limits)
        self.dogs = [Watchdog(deadlines, place(folder, rank, ranks, self.store)) for rank in range(ranks)]

    def enter(self, *phases: str) -> None:
        """As the loop does, in which a step comes after its data."""
        order = ("data", "step", "evaluate", "save")
        for dog, last in zip(self.dogs, phases, strict=True):
            for phase in order[: order.index(last) + 1]:
                dog._enter(phase, 3)

    def run(self, seconds: int, stopped: int | None = None, pause: float = 0.0) -> int:
        """Go on until somebody knows who is late; seconds that it took. `pause`: all stand still first."""
        self.now += pause
        for second in range(1, seconds + 1):
            self.now += 1
            for rank, dog in enumerate(self.dogs):
                if rank != stopped:
                    dog._pulse(self.store)
                    dog._tick()
            if any(dog._verdict for dog in self.dogs):
                return second
        return seconds

    def named(self) -> list[tuple[int, str]]:
        return [(dog._verdict[0].rank, dog._verdict[0].phase) for dog in self.dogs if dog._verdict]

    def speakers(self) -> int:
        return sum(dog._verdict[1] for dog in self.dogs if dog._verdict)


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return lambda ranks=2, **limits: Machine(monkeypatch, tmp_path, ranks, **limits)


def test_data_that_is_slow_ends_nobody_and_data_that_is_late_is_named(machine):
    """Rank 0 waits in the step for rank 1, which reads."""
    pair = machine(step=10, data=40)
    pair.enter("data", "data")
    pair.run(1)
    pair.dogs[0]._enter("step", 3)
    pair.run(36)
    assert pair.named() == []
    assert pair.run(20) <= 10
    pair.run(1)
    assert pair.named() == [(1, "data")] * 2
    assert pair.speakers() == 1


def test_a_step_that_was_late_once_leaves_nothing_behind(machine):
    pair = machine(step=10)
    for _ in range(3):
        pair.enter("step", "step")
        pair.run(12)
        assert pair.named() == []
    pair.enter("step", "step")
    pair.run(8)
    assert pair.run(20, stopped=1) <= 10
    assert pair.named() == [(1, "step")]


@pytest.mark.parametrize("stopped", [0, 1])
@pytest.mark.parametrize("phases", [("step", "step"), ("step", "data"), ("save", "save"), ("evaluate", "evaluate")])
@pytest.mark.parametrize("moment", [1, 3, 9])
def test_a_stopped_rank_is_named_within_the_deadline_and_some_beats(machine, stopped, phases, moment):
    """The agent's store, which answers also when rank 0 is stopped."""
    pair = machine(step=10, data=900, save=10, evaluate=10)
    pair.run(30)
    pair.enter(*(phases if stopped else phases[::-1]))
    pair.run(moment)
    assert pair.run(40, stopped=stopped) <= 10 + 6
    assert pair.named() == [(stopped, phases[1])]
    # It goes on after all, and hears of it.
    pair.dogs[stopped]._pulse(pair.store)
    assert pair.named() == [(stopped, phases[1])] * 2
    assert pair.speakers() == 1


def test_ranks_whose_time_is_up_at_once_name_the_same_one_and_one_of_them_speaks(machine):
    many = machine(ranks=4, step=10)
    many.enter(*["step"] * 4)
    # All look for a verdict before the first one writes its own.
    check = many.store.check
    many.store.check = lambda keys: keys != ["verdict"] and check(keys)
    many.run(30)
    many.run(1)
    assert len(many.named()) == 4
    assert len(set(many.named())) == 1
    assert many.speakers() == 1


def test_a_rank_that_comes_on_while_it_is_judged_is_let_go(machine):
    pair = machine(step=10, data=10)
    pair.enter("step", "data")
    for _ in range(20):
        if not pair.dogs[0]._suspect:
            pair.run(1)
    assert pair.dogs[0]._suspect
    assert pair.named() == []
    pair.dogs[1]._enter("step", 3)
    pair.run(6)
    assert pair.named() == []


@pytest.mark.parametrize("before", [1, 9, 11, 12])
def test_a_machine_that_stood_still_ends_nobody(machine, before):
    """Also one whose ranks wait longer than their own deadline by then, for data that are slow."""
    pair = machine(step=10, data=900)
    pair.enter("step", "data")
    pair.run(before)
    pair.run(30, pause=5000)
    assert pair.named() == []


def test_a_store_may_fail_for_some_beats(machine):
    pair = machine(step=10, data=900)
    pair.enter("step", "data")
    pair.run(9)
    pair.store.fails = True
    pair.run(6)
    pair.store.fails = False
    pair.run(20)
    assert pair.named() == []
    pair.store.fails = True
    assert pair.run(20) <= 9
    assert pair.named() == [(0, "step")]


def test_the_first_step_may_compile_and_tells_how_long_a_step_takes(machine):
    (dog, _) = machine(step=300, set_up=3600).dogs
    assert dog.deadline("first-step") == 3600
    with dog.phase("first-step", 1):
        for _ in range(400):
            dog._ticked = 0.0, dog._ticked[1] + 1
    assert dog.deadline("step") == dog.deadline("boundary") == 4000


def test_a_rank_that_waits_for_another_names_it(tmp_path, monkeypatch, capfd):
    """Rank 1 reads its data for too long; rank 0 waits in the step."""
    exits, store = Exits(monkeypatch), Store()
    limits = ENDLESS.model_copy(update={"step": 0.2, "data": 0.3})
    with (
        Watchdog(limits, place(tmp_path, 0, 2, store)) as first,
        Watchdog(limits, place(tmp_path, 1, 2, store)) as second,
    ):
        with first.phase("data", 3):
            pass
        second._enter("data", 3)
        first._enter("step", 3)
        assert exits.happened.wait(5)
        time.sleep(0.5)
    assert exits.codes == [87, 87]
    (event,) = EventLog(tmp_path / "e").read()
    assert (event["rank"], event["host"], event["phase"]) == (1, "node1", "data")
    assert capfd.readouterr().err.count("does not come on") == 1


def test_a_store_that_does_not_answer_is_the_fault_of_the_rank_that_serves_it(tmp_path, monkeypatch):
    exits, store = Exits(monkeypatch), Store()
    with Watchdog(ENDLESS.model_copy(update={"step": 0.2}), place(tmp_path, 1, 2, store)) as watchdog:
        store.silent = True
        with watchdog.phase("step", 3):
            assert exits.happened.wait(5)
        store.silent = False
    assert EventLog(tmp_path / "e").read()[0]["rank"] == 0


def test_collective_operations_wait_longer_than_any_deadline():
    limits = DeadlinesConfig()
    assert collective_timeout(limits).total_seconds() > max(limits.model_dump().values())
    assert collective_timeout(ENDLESS).days >= 7
