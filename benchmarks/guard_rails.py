"""What watching costs: watchdog, health, comparison of copies and log lines, as shares of the step in the same run.

    python benchmarks/guard_rails.py [--steps 40] [--rows 32] [--zero 1]

Trains the demo model on two ranks of this machine, with the clocks of each guard read around its calls; what does not
happen in every step is divided by its default interval (copies: 100 steps, lines: 10). The watchdog's threads are
counted by their processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "configs/run/demo.yaml"
ROW_TOKENS = 256
COPIES_EVERY, LINES_EVERY = 100, 10


def main() -> None:
    """Build shards, start the two ranks, print the larger figures of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=32, help="rows of a step, over both ranks")
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        return rank(arguments.rank_of, arguments.steps, arguments.rows, arguments.zero)
    with tempfile.TemporaryDirectory() as folder:
        _command("data", "sample", f"{folder}/corpus")
        _command("data", "build", f"{folder}/corpus", "--out", f"{folder}/shards")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", folder, *sys.argv[1:]],
                env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"},
            )
            for rank in range(2)
        ]
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit("a rank failed")
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]
    print(json.dumps({name: max(one[name] for one in found) for name in found[0]}, indent=2))
    return None


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rxt_dist", *arguments], check=True, cwd=ROOT, capture_output=True)


class Clocks:
    """Seconds and calls of named functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def read_around(self, owner: Any, name: str) -> None:
        """From here on `owner.name` is timed."""
        function, key = getattr(owner, name), f"{owner.__name__}.{name}"

        def timed(*given: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                self.seconds[key] += time.perf_counter() - began
                self.calls[key] += 1

        setattr(owner, name, timed)

    def each(self, key: str) -> float:
        """Mean seconds of a call."""
        return self.seconds[key] / max(1, self.calls[key])


def rank(folder: Path, steps: int, rows: int, zero: int) -> None:
    """One rank: the run, its figures into a file."""
    from rxt_dist.config.load import load_run
    from rxt_dist.engine.deepspeed import DeepSpeedEngine
    from rxt_dist.engine.replicated import ReplicatedEngine
    from rxt_dist.ranks import read_ranks
    from rxt_dist.train.health import Health
    from rxt_dist.train.pace import Pace
    from rxt_dist.train.reporter import Reporter
    from rxt_dist.train.run import train
    from rxt_dist.train.signals import StopRequest
    from rxt_dist.train.watchdog import Watchdog

    engine = ReplicatedEngine if zero == 0 else DeepSpeedEngine
    clocks, idle = Clocks(), {}
    for owner, names in (
        (Health, ("begin", "observe")),
        (Pace, ("exchange",)),
        (Reporter, ("line",)),
        (engine, ("differing_ranks", "train_step")),
    ):
        for name in names:
            clocks.read_around(owner, name)
    for name in ("_clock", "_heart"):
        _count_thread(Watchdog, name, idle)
    tokens = rows * ROW_TOKENS
    settings = {
        "output": folder / "runs", "data.path": folder / "shards", "log.wandb": "disabled", "log.every_steps": 2,
        "train.total_tokens": steps * tokens, "train.global_batch_tokens": tokens, "train.micro_batch_rows": rows // 2,
        "schedule.warmup_tokens": tokens, "parallel.zero": zero, "parallel.expert_parallel": 1,
        "health.replica_steps": 5, "data.max_epochs": 1000, "eval.rows_per_source": 2,
    }  # fmt: skip
    config = load_run(RUN, [f"{key}={value}" for key, value in settings.items()])
    began = time.monotonic()
    ranks = read_ranks(os.environ)
    with StopRequest(folder / "STOP") as stop:
        train(config, ranks, stop)
    seconds = time.monotonic() - began
    step = clocks.each(f"{engine.__name__}.train_step")
    costs = {
        "health": clocks.each("Health.begin") + clocks.each("Health.observe"),
        "lines": (clocks.each("Pace.exchange") + clocks.each("Reporter.line")) / LINES_EVERY,
        "copies": clocks.each(f"{engine.__name__}.differing_ranks") / COPIES_EVERY,
        "watchdog": sum(idle.values()) / seconds * step,
    }
    figures = {"step_s": step} | {f"{name}_share": cost / step for name, cost in costs.items()}
    figures |= {"all_share": sum(costs.values()) / step, "one comparison_s": costs["copies"] * COPIES_EVERY}
    (folder / f"{ranks.rank}.json").write_text(json.dumps(figures))


def _count_thread(owner: Any, name: str, into: dict[str, float]) -> None:
    """Note the processor seconds of a thread when it ends."""
    function = getattr(owner, name)

    def counted(self: Any) -> None:
        try:
            function(self)
        finally:
            into[threading.current_thread().name] = time.thread_time()

    setattr(owner, name, counted)


if __name__ == "__main__":
    main()
