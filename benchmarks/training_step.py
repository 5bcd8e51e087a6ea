"""Tokens per second of a training step on this machine, beside the public reference package.

    python benchmarks/training_step.py [--shape nano] [--rounds 3]

The reference (rxlm 0.3.80) has a non-commercial licence, so it is no dependency: the first run installs it into
benchmarks/.reference-venv with the torch version of this environment, and reference_training_step.py runs in it. Every
measurement is a fresh process; the two sides alternate, and medians over the rounds are compared. Prints a table
and one JSON object; takes about ten minutes on two cores, and 7.5 GB for `micro`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REFERENCE_VENV = HERE / ".reference-venv"
REFERENCE = "rxlm==0.3.80"
# What the reference's step imports. Its other declared dependencies (transformer-engine, datasets, ...) are for
# kernels and trainers that are not measured here, so it is installed without dependencies.
REFERENCE_NEEDS = ("huggingface-hub", "transformers>=4.51,<5", "tokenizers>=0.21,<0.22", "numpy", "pyyaml")
# Model file, rows, tokens in a row, timed steps a round.
SHAPES = {"nano": ("rxt-alpha-nano.yaml", 8, 256, 10), "micro": ("rxt-beta-micro.yaml", 1, 1024, 4)}
PRECISIONS = ("float32", "bfloat16")


def reference_python() -> Path:
    """The interpreter of the reference's environment, which is made on first use (about a minute, 1 GB)."""
    python = REFERENCE_VENV / "bin" / "python"
    complete = REFERENCE_VENV / "complete"
    if not complete.exists():
        shutil.rmtree(REFERENCE_VENV, ignore_errors=True)
        venv.create(REFERENCE_VENV, with_pip=True)
        (REFERENCE_VENV / ".gitignore").write_text("*\n")
        torch = f"torch=={metadata.version('torch').partition('+')[0]}"
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, torch, *REFERENCE_NEEDS], check=True, stdout=sys.stderr)
        subprocess.run([*install, "--no-deps", REFERENCE], check=True, stdout=sys.stderr)
        complete.touch()
    return python


def measure(side: str, shape: str, precision: str) -> dict[str, Any]:
    """What one fresh process of a side, 'ours' or 'reference', prints for a shape of `SHAPES`."""
    model, rows, length, steps = SHAPES[shape]
    python = reference_python() if side == "reference" else Path(sys.executable)
    command = [
        str(python),
        str(HERE / f"{side.replace('ours', 'our')}_training_step.py"),
        str(HERE.parent / "configs" / "model" / model),
        f"--rows={rows}",
        f"--length={length}",
        f"--steps={steps}",
        f"--precision={precision}",
    ]
    # By default idle OpenMP threads spin for good; when anything else runs, steps then take up to ten times as long.
    environment = os.environ | {"GOMP_SPINCOUNT": "20000"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure_shape(shape: str, rounds: int) -> dict[str, Any]:
    """Medians over rounds of tokens/s and peak memory, by side and precision."""
    cases = [(side, precision) for precision in PRECISIONS for side in ("reference", "ours")]
    taken: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            taken[case].append(measure(case[0], shape, case[1]))
    result: dict[str, Any] = {"shape": shape, "rounds": rounds}
    for (side, precision), runs in taken.items():
        for field in ("tokens_per_s", "peak_rss_bytes"):
            result[f"{side}_{precision}_{field}"] = statistics.median(run[field] for run in runs)
        result[f"{side}_{precision}_all_tokens_per_s"] = [round(run["tokens_per_s"]) for run in runs]
    return result


def table(results: list[dict[str, Any]]) -> str:
    """One line per shape and precision of ours, against the reference in float32 and in the same precision."""
    lines = [
        "| shape | precision | tokens/s | / reference float32 | / reference same precision "
        "| peak GB | / reference float32 | / reference same precision |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for precision in PRECISIONS:
            cells = [result["shape"], precision]
            for field, unit, form in (("tokens_per_s", 1, ",.0f"), ("peak_rss_bytes", 1e9, ".2f")):
                ours = result[f"ours_{precision}_{field}"]
                cells.append(format(ours / unit, form))
                for other in ("float32", precision):
                    reference = result[f"reference_{other}_{field}"]
                    cells.append(f"{ours / reference:.2f} ({format(reference / unit, form)})")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated; default: all shapes")
    parser.add_argument("--rounds", type=int, default=3, help="measurements per side and precision (default 3)")
    arguments = parser.parse_args()
    results = [measure_shape(shape, arguments.rounds) for shape in arguments.shape or SHAPES]
    print(table(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
