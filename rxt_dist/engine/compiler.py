"""The C compiler of this machine, which Triton and torch.compile call."""

from __future__ import annotations

import os
import shutil


def find_compiler() -> str | None:
    """Its path or name; None where there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
