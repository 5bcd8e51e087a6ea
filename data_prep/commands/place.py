"""Where a row that is shown stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple


class Place(NamedTuple):
    """A row, or dialogue: of which dataset, source (its number there, and what an order calls it), split.

    position, epoch: where a training reads it, unless the row was named. step: of a run, None beyond its end.
    """

    dataset: Path
    source: int
    called: str
    row: int
    split: str = "train"
    position: int | None = None
    epoch: int | None = None
    of_run: bool = False
    step: int | None = None

    def value(self) -> dict[str, Any]:
        """What `--json` says of it."""
        order = {"position": self.position, "epoch": self.epoch} if self.position is not None else {}
        step = {"step": self.step} if self.of_run else {}
        return (
            order | step | {"dataset": str(self.dataset), "source": self.called, "split": self.split, "row": self.row}
        )

    def words(self, what: str) -> str:
        """The place as a person is told it."""
        if self.position is None:
            return f"{what[0].upper()}{what[1:]} {self.row} of {self.called}/{self.split}"
        step = f", step {self.step}" if self.step else ""
        return f"Position {self.position} (epoch {self.epoch}{step}): {what} {self.row} of source {self.called}"


def inputs_of(dataset: Path, unit: str) -> list[str]:
    """The files that a unit was read from, as far as the folder keeps its plan."""
    from data_prep.shards.trace import stored_unit

    found = stored_unit(dataset, unit)
    return list(dict.fromkeys(part.input.path for part in found.slices)) if found else []


def read_from(inputs: list[str]) -> str:
    """As the end of a sentence about a unit."""
    return f" was read from {', '.join(inputs[:3])}{', ...' if len(inputs) > 3 else ''}" if inputs else ""
