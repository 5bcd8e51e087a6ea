"""Seconds from `rxt-dist launch local` to the end of the first training step, on two ranks of this machine.

    python benchmarks/start_time.py [--rounds 3]

Builds the demo's shards in a scratch directory, runs configs/run/demo.yaml (ZeRO-3, expert parallelism) on them for two
steps, and reads when the first line of metrics.jsonl was written.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUN = "configs/run/demo.yaml"
STEP_TOKENS = 4096


def command(*arguments: str) -> None:
    """Run one `rxt-dist` command to its end."""
    subprocess.run([sys.executable, "-m", "rxt_dist", *arguments], check=True, cwd=ROOT, capture_output=True)


def seconds_to_first_step(scratch: Path, number: int) -> float:
    """One run of two steps."""
    settings = {
        "output": scratch / "runs",
        "name": f"run{number}",
        "data.path": scratch / "shards",
        "train.total_tokens": 2 * STEP_TOKENS,
        "schedule.warmup_tokens": STEP_TOKENS,
        "log.every_steps": 1,
        "log.wandb": "disabled",
    }
    began = time.time()
    command("launch", "local", RUN, "--ranks", "2", *(f"{key}={value}" for key, value in settings.items()))
    first = (scratch / "runs" / f"run{number}" / "metrics.jsonl").read_text().splitlines()[0]
    return datetime.fromisoformat(json.loads(first)["time"]).timestamp() - began


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs, one after another (default 3)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        command("data", "sample", str(scratch / "corpus"))
        command("data", "build", str(scratch / "corpus"), "--out", str(scratch / "shards"))
        taken = [seconds_to_first_step(scratch, number) for number in range(arguments.rounds)]
    print(json.dumps({"median_seconds": statistics.median(taken), "seconds": taken}))


if __name__ == "__main__":
    main()
