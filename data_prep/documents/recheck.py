"""Reading finished units again, where the files that they were built from look different now.

They may have been copied or touched; they may also have been edited where the fingerprint does not look. Then units of
one dataset would come from different texts, and nobody could build it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from data_prep.building.folder import read_stored, unit_path
from data_prep.building.workers import Progress, Report, Show, run_units
from data_prep.corpora import ReadCounts, read_unit
from data_prep.documents.inputs import files_of, is_as_recorded, keep_record, require_planned, require_unchanged
from data_prep.documents.unit import hash_text
from data_prep.units import Unit
from rxt_dist.data.manifest import DATASET_FILE
from rxt_dist.errors import DataError


@dataclass(frozen=True)
class RecheckPass:
    """Compares the texts of units with those that they were built from; travels to worker processes."""

    out: Path

    def is_done(self, unit: Unit) -> bool:
        """Whether its files are those that it was built from, as far as the system says."""
        return is_as_recorded(self.out, unit)

    def open(self) -> Callable[[Unit, Report], None]:
        """Nothing to load."""
        return self._compare

    def _compare(self, unit: Unit, report: Report) -> None:
        before, digest, size = require_planned(unit), blake3(), 0
        for document in read_unit(unit, ReadCounts()):
            hashed, text_bytes = hash_text(document.text)
            digest.update(hashed)
            size += text_bytes
            report(size, 0)
        require_unchanged(unit, before)
        content = read_stored(unit_path(self.out, unit.name))
        if content["documents_blake3"] != digest.hexdigest():
            names = ", ".join(item.path for item in files_of(unit)[:5])
            raise DataError(
                f"The texts of unit {unit.name} are not those that it was built from: {names} was edited since, and "
                f"{self.out} would hold some of the old and some of the new. Restore the file and run the same command "
                f"again, or build into another folder."
            )
        keep_record(self.out, unit, before)


def require_same_texts(out: Path, units: Sequence[Unit], workers: int, say: Callable[[str], None], show: Show) -> None:
    """Before a dataset is finished: all of its units were built from the files as they are now.

    Costs a look at each file, and reading the units again of which a file was copied, touched or edited since.

    Raises:
        DataError: an input was edited between two units, with its name.
    """
    if (out / DATASET_FILE).is_file():  # it was finished before, and only the same rows take its place
        return
    recheck = RecheckPass(out)
    changed = [unit for unit in units if not recheck.is_done(unit)]
    if changed:
        say(f"The inputs of {len(changed)} finished units may have changed since they were built: reading them again")
        progress = Progress("Comparing", len(changed), sum(unit.text_bytes for unit in changed))
        run_units(recheck, changed, workers, progress, show, patient=True)
