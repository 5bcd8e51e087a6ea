"""Ranks that are small scripts, and launchers of them with little patience."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from launch.local import Launch, launch
from launch.watching import Patience
from rxt_dist.train.events import EventLog

ROOT = Path(__file__).parents[2]

# A rank that behaves like the trainer: it saves and leaves with 75 when asked to stop.
OBEDIENT = """
import os, pathlib, signal, sys, time
folder, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
asked = []
for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
    signal.signal(number, lambda number, frame: asked.append(number))
(folder / f"ready{rank}").touch()
for _ in range(6000):
    if asked:
        (folder / f"asked{rank}").write_text(signal.Signals(asked[0]).name)
        sys.exit(75)
    time.sleep(0.01)
"""
LAUNCH = """
import json, sys
from pathlib import Path
from launch.local import Launch, launch
from launch.watching import Patience
run = Path(sys.argv[2]) if sys.argv[2] else None
sys.exit(launch(Launch(sys.argv[4:], 2, int(sys.argv[1]), run, patience=Patience(**json.loads(sys.argv[3])))))
"""
PATIENCE = {"grace": 0.5, "answer": 10.0, "suspended": 0.5, "back_off": 0.05}
# Takes the run for its life as the trainer does, then does what the argument says.
TAKING = """
import json, os, pathlib, signal, sys, time
run, rank = pathlib.Path(sys.argv[1]), int(os.environ["RANK"])
attempt, life = int(os.environ["RXT_ATTEMPT"]), os.environ["RXT_LIFE"]
def words(text):
    pathlib.Path(os.environ["RXT_LAST_WORDS"]).write_text(text)
if rank == 0:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    (run / "life.json").write_text(json.dumps({"life": life}))
    (run / "lives").open("a").write("x")
"""


def script(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-S", "-c", code, *map(str, arguments)]


def start(attempts: int, command: list[str], run: Path | None = None, **patience: float) -> subprocess.Popen[str]:
    """The launcher as a process of its own, with two ranks."""
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(attempts), str(run or ""), json.dumps(PATIENCE | patience), *command],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        # What was started in the background of a shell ignores Ctrl-C, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def launched(command: list[str], ranks: int, attempts: int = 0, run: Path | None = None) -> int:
    """The launcher in this process, with little patience."""
    patience = Patience(grace=0.3, answer=1.0, suspended=0.3, back_off=0.01)
    return launch(Launch(command, ranks, attempts, run, patience=patience))


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"still waiting for {paths}"
        time.sleep(0.01)


def events(run: Path, kind: str) -> list[dict[str, object]]:
    return [event for event in EventLog(run / "events.jsonl").read() if event["kind"] == kind]
