"""The watchdog by itself: deadlines, pauses, which rank is late. Real processes: tests/faults/test_hang.py."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rxt_dist.config.run import DeadlinesConfig
from rxt_dist.train import watchdog as module
from rxt_dist.train.events import EventLog
from rxt_dist.train.watchdog import Surroundings, Watchdog, collective_timeout, late_rank

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

    def _answer(self) -> None:
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

    def add(self, key: str, amount: int) -> int:
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]


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
    watchdog = Watchdog(ENDLESS.model_copy(update={"step": 0.01}), place(tmp_path))
    assert watchdog.deadline("step") == 0.01
    for step in range(5):
        with watchdog.phase("step", step):
            time.sleep(0.02)
    assert 0.2 <= watchdog.deadline("step") < 1
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


def said(beat: int, phase: str, step: int) -> dict[str, Any]:
    return {"beat": beat, "phase": phase, "step": step}


@pytest.mark.parametrize(
    ("before", "after", "late"),
    [
        ({0: said(1, "step", 5), 1: said(1, "step", 5)}, {0: said(4, "step", 5), 1: said(1, "step", 5)}, 1),
        ({0: said(1, "step", 5)}, {0: said(4, "step", 5)}, 1),
        ({0: said(1, "step", 5), 1: said(1, "data", 5)}, {0: said(4, "step", 5), 1: said(4, "data", 5)}, 1),
        ({0: said(1, "data", 6), 1: said(1, "save", 5)}, {0: said(4, "data", 6), 1: said(4, "save", 5)}, 1),
        ({0: said(1, "step", 5), 1: said(1, "step", 5)}, {0: said(4, "step", 5), 1: said(4, "step", 5)}, 0),
    ],
)
def test_the_late_rank(before, after, late):
    rank, how = late_rank(before, after, 2, asking=0)
    assert rank == late
    assert how


def test_a_rank_that_waits_for_another_names_it(tmp_path, monkeypatch, capfd):
    """Rank 1 reads its data for ever; rank 0 waits in the step."""
    exits, store = Exits(monkeypatch), Store()
    limits = ENDLESS.model_copy(update={"step": 0.2})
    with (
        Watchdog(limits, place(tmp_path, 0, 2, store)) as first,
        Watchdog(limits, place(tmp_path, 1, 2, store)) as second,
        second.phase("data", 3),
        first.phase("step", 3),
    ):
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
