"""Seconds from `rxt-dist launch local` to the end of the first training step, on two ranks of this machine.

    python benchmarks/start_time.py [--rounds 3]

Runs configs/run/demo.yaml (ZeRO-3, expert parallelism) for two steps in a scratch directory and reads when the first
line of metrics.jsonl was written. Needs the demo's shards (`make demo`, or the two `rxt-dist data` commands it prints).
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


def seconds_to_first_step() -> float:
    """One run of two steps."""
    with tempfile.TemporaryDirectory() as output:
        overrides = [f"output={output}", f"train.total_tokens={2 * STEP_TOKENS}", "log.every_steps=1"]
        command = [sys.executable, "-m", "rxt_dist", "launch", "local", RUN, "--ranks", "2"]
        began = time.time()
        subprocess.run([*command, *overrides], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        first = (Path(output) / "demo" / "metrics.jsonl").read_text().splitlines()[0]
    return datetime.fromisoformat(json.loads(first)["time"]).timestamp() - began


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="runs, one after another (default 3)")
    arguments = parser.parse_args()
    taken = [seconds_to_first_step() for _ in range(arguments.rounds)]
    print(json.dumps({"median_seconds": statistics.median(taken), "seconds": taken}))


if __name__ == "__main__":
    main()
