"""The public reference package's step on the same work in the same run, where it is at hand."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from gpu_parts.context import Context
from gpu_parts.device import fitting
from gpu_parts.steps import DEPTHS, built, measure
from gpu_parts.work import BETA, CONFIGS, configuration, row_tokens

SCRIPT = Path(__file__).resolve().parents[1] / "reference_training_step.py"
_STEPS = 3
_SECONDS = 40
_LEAST_SECONDS = 30
# Where benchmarks/gpu_wheels.py unpacked the reference with the versions that it wants.
SITE = os.environ.get("RXT_REFERENCE_SITE", "")


def reference(context: Context) -> None:
    """RxT-Beta's shape, rows of one document each, on both sides; with fewer layers where one does not fit."""
    if not (SITE and Path(SITE, "rxlm").is_dir()) and importlib.util.find_spec("rxlm") is None:
        context.note("the reference package rxlm is not at hand; nothing was measured")
        return
    for layers in DEPTHS:
        if context.seconds_left < _LEAST_SECONDS:
            context.note("no time for fewer layers")
            return
        shown = configuration(BETA, context.device, layers=layers).model.layers
        theirs = {way: _theirs(context, layers, way == "batched") for way in ("batched", "loop")}
        measured = {way: found for way, found in theirs.items() if isinstance(found, dict)}
        for way, found in theirs.items():
            if isinstance(found, str):
                context.row(side=f"reference, experts {way}", layers=shown, tokens_per_s=found)
        if measured:
            _compare(context, layers, measured)
            return
        if not any("OutOfMemory" in str(found) for found in theirs.values()):
            return


def _compare(context: Context, layers: int, theirs: dict[str, dict[str, Any]]) -> None:
    ours: dict[str, Any] = {}
    with fitting(context.device) as outcome:
        ours = _ours(context, layers)
    rate = ours.get("tokens/s", float("nan"))
    context.row(
        side="ours",
        layers=ours.get("layers"),
        tokens_per_s=outcome[0] if outcome else rate,
        peak_GB=ours.get("peak GB"),
    )
    for way, found in theirs.items():
        context.row(
            side=f"reference, experts {way}",
            layers=ours.get("layers"),
            tokens_per_s=found["tokens_per_s"],
            peak_GB=found["peak_gpu_bytes"] / 1e9,
            ours_to_it=rate / found["tokens_per_s"],
        )


def _ours(context: Context, layers: int) -> dict[str, Any]:
    with built(context, configuration(BETA, context.device, layers=layers)) as (engine, stage):
        return measure(context, engine, stage, BETA, 1, packed=False)


def _theirs(context: Context, layers: int, vectorized: bool) -> dict[str, Any] | str:
    """What its script measured, or why not."""
    device = context.device
    device.free()
    command = [
        sys.executable,
        str(SCRIPT),
        str(CONFIGS / "model" / BETA.model),
        "--rows=1",
        f"--length={row_tokens(BETA, device)}",
        f"--steps={_STEPS}",
        "--precision=bfloat16",
        f"--device={device.device.type}",
        *(["--vectorized"] if vectorized else []),
        *([f"--set={change}" for change in BETA.tiny] if device.dry else [f"--set=layers={layers}"]),
    ]
    path = os.pathsep.join([SITE, os.environ.get("PYTHONPATH", "")])
    limit = max(1.0, min(_SECONDS, context.seconds_left))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=limit, env=os.environ | {"PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"longer than {limit:.0f} s"
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line and not line.startswith(" ")]
        return (errors or ["no output"])[-1][:200]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
