"""All sections, in the order of what is to be known first."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from gpu_parts import data, operations, reference, steps
from gpu_parts.context import Context
from gpu_parts.device import Device
from gpu_parts.report import DONE, FAILED, Report


@dataclass(frozen=True)
class Section:
    """needs: with less time left (seconds) it is not begun. most: after so many seconds it is ended."""

    name: str
    needs: int
    most: int
    run: Callable[[Context], None]

    @property
    def title(self) -> str:
        """The first line of its documentation."""
        function = getattr(self.run, "func", self.run)
        return str(function.__doc__).strip().splitlines()[0].rstrip(".")


SECTIONS = [
    Section("environment", 5, 60, operations.environment),
    Section("peaks", 10, 60, operations.peaks),
    Section("attention", 10, 60, operations.attention),
    Section("experts", 10, 60, operations.experts),
    Section("joint-step", 30, 180, steps.sweep),
    Section("kernels", 20, 60, steps.kernels),
    Section("reference", 20, 100, reference.reference),
    Section("zero3", 25, 90, partial(steps.zero, stage=3)),
    Section("zero1", 25, 90, partial(steps.zero, stage=1)),
    Section("autoep", 20, 60, steps.autoep),
    Section("small-shapes", 20, 60, steps.small_shapes),
    Section("cross-entropy", 10, 40, operations.cross_entropy),
    Section("data", 10, 40, data.expansion),
    Section("saving", 20, 60, data.saving),
]
BY_NAME = {section.name: section for section in SECTIONS}


def run_section(section: Section, report: Report, device: Device, ends: float) -> bool:
    """Run one section and write how it went; True where it went well. An error is written down, not raised."""
    began = time.time()
    report.begin(section.name, section.title)
    try:
        section.run(Context(section.name, device, report, min(ends, began + section.most)))
    except Exception as error:
        traceback.print_exc()
        last = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{last} ({place.filename.rsplit('/', 1)[-1]}:{place.lineno})"
        report.end(section.name, section.title, FAILED, why, time.time() - began)
        return False
    report.end(section.name, section.title, DONE, seconds=time.time() - began)
    return True
