"""Tokens per second of the joint training step on this machine, beside the public reference package.

    python benchmarks/joint_step.py [--shape nano] [--steps 5]

The reference (rxlm 0.3.80) has a non-commercial licence, so it is no dependency: the first run installs it into
benchmarks/.reference-venv with the torch version of this environment, and benchmarks/reference_joint_step.py runs there
in a process of its own. Prints one JSON object; takes about a minute per shape on two cores, and 7.5 GB for `micro`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REFERENCE_VENV = HERE / ".reference-venv"
REFERENCE = "rxlm==0.3.80"
# What the reference's joint step imports. Its other declared dependencies (transformer-engine, datasets, ...) are for
# kernels and trainers that are not measured here, so it is installed without dependencies.
REFERENCE_NEEDS = ("huggingface-hub", "transformers>=4.51,<5", "tokenizers>=0.21,<0.22", "numpy", "pyyaml")
# Model file, rows and tokens in a row.
SHAPES = {"nano": ("rxt-alpha-nano.yaml", 8, 256), "micro": ("rxt-beta-micro.yaml", 1, 1024)}


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


def measure_reference(shape: str, steps: int) -> dict[str, Any]:
    """What benchmarks/reference_joint_step.py prints for a shape of `SHAPES`."""
    model, rows, length = SHAPES[shape]
    command = [
        str(reference_python()),
        str(HERE / "reference_joint_step.py"),
        str(HERE.parent / "configs" / "model" / model),
        f"--rows={rows}",
        f"--length={length}",
        f"--steps={steps}",
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="may be repeated; default: all shapes")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per shape; the median counts (default 5)")
    arguments = parser.parse_args()
    shapes = arguments.shape or list(SHAPES)
    print(json.dumps({"reference": {shape: measure_reference(shape, arguments.steps) for shape in shapes}}, indent=2))


if __name__ == "__main__":
    main()
