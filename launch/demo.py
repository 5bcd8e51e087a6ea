"""`make demo`: the whole way on this machine, from text to a trained, interrupted and resumed model.

Sample corpus -> tokenizer and shards -> two ranks with ZeRO-3 and expert parallelism -> a real SIGTERM half way ->
resume by itself -> evaluation. Every step is a command that is printed before it runs, so that it can be run again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUN = "configs/run/demo.yaml"
FOLDER = Path(".demo")
RUN_DIRECTORY = Path("runs/demo")
_POLL_SECONDS = 0.5


def main() -> int:
    """Run the demo in the current directory; returns the exit code."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Two ranks on CPU, whatever the machine has.
    started = time.monotonic()
    for old in (FOLDER, RUN_DIRECTORY):
        shutil.rmtree(old, ignore_errors=True)
    _run("data", "sample", str(FOLDER / "corpus"))
    _run("data", "build", str(FOLDER / "corpus"), "--out", str(FOLDER / "shards"))
    code = _train_interrupted()
    if code:
        return code
    _report(time.monotonic() - started)
    return 0


def _command(*arguments: str) -> list[str]:
    print(f"\n$ rxt-dist {' '.join(arguments)}", flush=True)
    return [sys.executable, "-m", "rxt_dist", *arguments]


def _run(*arguments: str) -> None:
    subprocess.run(_command(*arguments), check=True)


def _train_interrupted() -> int:
    """Train; when half of the steps are logged, send SIGTERM to a rank, and let the launcher start all ranks again."""
    process = subprocess.Popen(_command("launch", "local", RUN, "--ranks", "2", "--resume-attempts", "1"))
    stopped = False
    while process.poll() is None:
        if not stopped and _last("metrics.jsonl").get("tokens", 0) >= _total_tokens() / 2:
            print("\n>>> half way: SIGTERM to rank 0; the run saves, stops and resumes by itself\n", flush=True)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGTERM)
            stopped = True
        time.sleep(_POLL_SECONDS)
    return process.returncode


def _total_tokens() -> int:
    import yaml

    return int(yaml.safe_load(Path(RUN).read_text())["train"]["total_tokens"])


def _lines(name: str) -> list[dict[str, Any]]:
    path = RUN_DIRECTORY / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _last(name: str) -> dict[str, Any]:
    lines = _lines(name)
    return lines[-1] if lines else {}


def _report(seconds: float) -> None:
    """What happened, where it is, and what to do next."""
    steps = [line for line in _lines("metrics.jsonl") if "ar_accuracy" in line]
    kinds = [event["kind"] for event in _lines("events.jsonl")]
    first, last = steps[0], steps[-1]
    print(
        f"""
The demo took {seconds:.0f} s: {last["step"]} steps, {kinds.count("save")} checkpoints, {kinds.count("stop")} stop, \
{kinds.count("resume")} resume.
Next-token accuracy in training: {100 * first["ar_accuracy"]:.1f} % at step {first["step"]}, \
{100 * last["ar_accuracy"]:.1f} % at step {last["step"]} (held-out figures: the table above).

Everything about the run is in {RUN_DIRECTORY}/: metrics.jsonl, events.jsonl, config.resolved.yaml, checkpoints/.

Try next:
  rxt-dist report {RUN_DIRECTORY}
  rxt-dist checkpoint list {RUN_DIRECTORY}
  rxt-dist data show {FOLDER / "shards"} --position 0
  rxt-dist plan configs/run/rxt-beta.yaml
  rxt-dist data build my_texts/ --out shards/
  rxt-dist launch local {RUN} --ranks 2 name=mine data.path=shards/"""
    )


if __name__ == "__main__":
    sys.exit(main())
