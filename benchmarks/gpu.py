"""What a GPU says about training at RxT-Beta's shape, in one command and at most eight minutes.

    python benchmarks/gpu.py --out DIR [--minutes 8] [--only joint-step]

Each section runs in a process of its own, so that one that fails, hangs or breaks the device does not end the others.
DIR/gpu.md and DIR/gpu.json are written anew after every row. docs/gpu.md says how to read them. `--dry-run` runs all
sections at tiny shapes on the CPU, in one process: it shows that the program is sound, and no speed.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

from gpu_parts.device import Device
from gpu_parts.report import FAILED, JSON_NAME, MARKDOWN_NAME, RUNNING, SKIPPED, Report
from gpu_parts.sections import BY_NAME, SECTIONS, Section, run_section


def main() -> int:
    """Parse the arguments, run the sections, print the page. The exit code is 1 if any section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="what does not fit in is left out (default 8)")
    parser.add_argument("--only", action="append", choices=BY_NAME, help="this section; may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--worker", type=float, metavar="ENDS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = [section for section in SECTIONS if section.name in (arguments.only or BY_NAME)]
    if arguments.worker is not None:
        return _work(wanted, arguments.out, arguments.dry_run, arguments.worker)
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU here. Run it where there is one, or with --dry-run on the CPU.")
    ends = time.time() + arguments.minutes * 60
    for stale in (JSON_NAME, MARKDOWN_NAME):
        (arguments.out / stale).unlink(missing_ok=True)
    for together in [wanted] if arguments.dry_run else [[section] for section in wanted]:
        supervise(together, arguments.out, arguments.dry_run, ends)
    report = Report(arguments.out)
    print(report.markdown())
    return int(any(report.status(section.name) == FAILED for section in wanted))


def _work(sections: list[Section], folder: Path, dry: bool, ends: float) -> int:
    """Be the process of some sections."""
    report, device = Report(folder), Device(dry)
    if dry:
        # On a GPU a process runs one section, which may need neither of them.
        import torch._dynamo  # noqa: F401

        import rxt_dist.engine.deepspeed  # noqa: F401
    # Garbage is collected between measurements; what is imported by now need not be looked through each time.
    gc.freeze()
    went_well = [run_section(section, report, device, ends) for section in sections]
    return int(not all(went_well))


def supervise(sections: list[Section], folder: Path, dry: bool, ends: float) -> None:
    """Run sections in a process, end it when its time is over, and write down what it could not write itself."""
    left = ends - time.time()
    if left < max(section.needs for section in sections):
        report = Report(folder)
        for section in sections:
            report.end(section.name, section.title, SKIPPED, f"{max(0.0, left):.0f} s were left")
        return
    names = [argument for section in sections for argument in ("--only", section.name)]
    command = [sys.executable, __file__, "--out", str(folder), "--worker", str(ends), *names]
    process = subprocess.Popen(command + (["--dry-run"] if dry else []))
    why = ""
    limit = min(left, sum(section.most for section in sections))
    try:
        code = process.wait(limit)
        why = f"its process ended with code {code}"
    except subprocess.TimeoutExpired:
        why = f"ended after {limit:.0f} s"
    finally:
        process.kill()
        process.wait()
    report = Report(folder)
    for section in sections:
        if report.status(section.name) in (RUNNING, ""):
            report.end(section.name, section.title, FAILED, why, limit)


if __name__ == "__main__":
    sys.exit(main())
