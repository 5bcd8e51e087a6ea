"""`make demo`: a small Reactive Transformer's whole life on this machine, from nothing to a conversation.

A chain (configs/chain/demo.yaml) makes its data, trains four stages on two ranks, the first with ZeRO-3 and expert
parallelism and a real SIGTERM half way; then the model is exported, and answers questions about what it was told turns
before. Every step is a command that is printed before it runs, so that it can be run again.
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

from rxt_dist.config.chain import Chain, load_chain

CHAIN = Path("configs/chain/demo.yaml")
FOLDER = Path(".demo")
EXPORT = FOLDER / "export"
# Held-out values, and those that training saw in other dialogues.
SHOWN = ("recall-d4-en", "recall-d4-pl")
_POLL_SECONDS = 0.5


def main() -> int:
    """Run the demo in the current directory; returns the exit code."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Two ranks on CPU, whatever the machine has.
    started, chain = time.monotonic(), load_chain(CHAIN)
    runs = [run.directory for run in chain.runs.values()]
    for old in (FOLDER, chain.directory, *runs):
        shutil.rmtree(old, ignore_errors=True)
    code = _train_interrupted(chain)
    if code:
        return code
    _run("export", str(runs[-1]), "--out", str(EXPORT))
    _run("evaluate", str(EXPORT), str(FOLDER / "dialogues"), "--recall", "--rows", "64", "--show", "2", *_sources())
    _report(runs, time.monotonic() - started)
    return 0


def _sources() -> list[str]:
    return [part for source in SHOWN for part in ("--source", source)]


def _command(*arguments: str) -> list[str]:
    print(f"\n$ rxt-dist {' '.join(arguments)}", flush=True)
    return [sys.executable, "-m", "rxt_dist", *arguments]


def _run(*arguments: str) -> None:
    subprocess.run(_command(*arguments), check=True)


def _train_interrupted(chain: Chain) -> int:
    """Train; when half of the first run is logged, send SIGTERM to a rank, and let all ranks be started again."""
    process = subprocess.Popen(_command("pipeline", str(CHAIN), "--ranks", "2", "--resume-attempts", "1"))
    first, stopped = next(iter(chain.runs.values())), False
    while process.poll() is None:
        line = _last(first.directory / "metrics.jsonl")
        if not stopped and line.get("tokens", 0) >= first.train.total_tokens / 2:
            print("\n>>> half way: SIGTERM to a rank; the run saves, stops and resumes by itself\n", flush=True)
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            os.kill(int(children[0]), signal.SIGTERM)
            stopped = True
        time.sleep(_POLL_SECONDS)
    return process.returncode


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _last(path: Path) -> dict[str, Any]:
    lines = _lines(path)
    return lines[-1] if lines else {}


def _report(runs: list[Path], seconds: float) -> None:
    """What happened, where it is, and what to do next."""
    kinds = [event["kind"] for run in runs for event in _lines(run / "events.jsonl")]
    steps = sum(_last(run / "metrics.jsonl")["step"] for run in runs)
    print(
        f"""
The demo took {seconds:.0f} s: {steps:,} steps of {len(runs)} runs, {kinds.count("save")} checkpoints, \
{kinds.count("stop")} stop, {kinds.count("resume")} resume.

The runs are in {runs[0].parent}/demo-*/ (metrics.jsonl, events.jsonl, config.resolved.yaml, checkpoints/), the data and
the exported model in {FOLDER}/.

Try next:
  rxt-dist chat {EXPORT} --temperature 0
  rxt-dist report {CHAIN}
  rxt-dist checkpoint list {runs[-1]}
  rxt-dist data show {FOLDER}/dialogues --source recall-d4-pl --row 0
  rxt-dist plan configs/run/rxt-beta.yaml
  rxt-dist data build my_texts/ --out shards/
  rxt-dist launch local configs/run/demo.yaml --ranks 2 name=mine data.path=shards/"""
    )


if __name__ == "__main__":
    sys.exit(main())
