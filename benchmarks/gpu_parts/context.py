"""What a section is given: the device, a place for its rows, and how much time is left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from gpu_parts.device import Device
from gpu_parts.report import Report


@dataclass(frozen=True)
class Context:
    """Of one section. ends: when its time is over, or that of the whole run (`time.time`)."""

    section: str
    device: Device
    report: Report
    ends: float

    def row(self, **cells: Any) -> None:
        """A line of this section's table, written at once."""
        self.report.row(self.section, **cells)

    def note(self, text: str) -> None:
        """A sentence below it."""
        self.report.note(self.section, text)

    def fact(self, name: str, default: Any = None) -> Any:
        """What an earlier section found."""
        return self.report.content["facts"].get(name, default)

    @property
    def seconds_left(self) -> float:
        """Of the section."""
        return self.ends - time.time()

    def share_of_peak(self, operations_per_second: float) -> float | str:
        """Of the bfloat16 peak that was measured on this device in this run."""
        peak = self.fact("bf16_tflops_measured")
        return operations_per_second / (peak * 1e12) if peak else "no peak measured"

    def floor_ms(self, operations: float, bytes_moved: float) -> tuple[float, str]:
        """The least time that work takes on this device, and which of its limits it is."""
        arithmetic = operations / (self.fact("bf16_tflops_measured", float("inf")) * 1e9)
        memory = bytes_moved / (self.fact("copy_gb_per_s_measured", float("inf")) * 1e6)
        return max(arithmetic, memory), "arithmetic" if arithmetic > memory else "memory"
