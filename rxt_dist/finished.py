"""Whether a run is finished: trained and evaluated up to its newest checkpoint. Needs no torch.

`finished.json` says up to which step a run is done. It may be older than a checkpoint beside it, or damaged.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path

FINISHED = "finished.json"
# The folder of a committed checkpoint.
COMMITTED = re.compile(r"step-(\d{8,})")


def finished_step(run: Path) -> int | None:
    """The step up to which a run says that it is trained and evaluated; None: it says none."""
    with suppress(OSError, ValueError, RecursionError):
        said = json.loads((run / FINISHED).read_bytes())
        step = said.get("step") if isinstance(said, dict) else None
        return step if type(step) is int and step > 0 else None
    return None


def newest_step(run: Path) -> int:
    """Step of the newest committed checkpoint of a run; -1: there is none."""
    with suppress(OSError):
        names = (COMMITTED.fullmatch(path.name) for path in (run / "checkpoints").iterdir())
        return max((int(name[1]) for name in names if name), default=-1)
    return -1


def is_finished(run: Path) -> bool:
    """Whether a run is trained and evaluated up to its newest checkpoint."""
    return finished_step(run) == newest_step(run)
