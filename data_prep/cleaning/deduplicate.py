"""De-duplication as a pass of a build: survey all units, decide once, and let each unit drop what was decided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_prep.cleaning import duplicates
from data_prep.cleaning.survey import FOLDER, open_survey, survey_path, survey_unit
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig

Report = Callable[[int, int], None]


def removes_duplicates(config: CleanConfig) -> bool:
    """Whether units have to be surveyed before any can be built."""
    return config.exact_duplicates or config.near_duplicates is not None


@dataclass(frozen=True)
class SurveyPass:
    """Surveys units; it travels to worker processes (data_prep/building/workers.py)."""

    out: Path
    clean: CleanConfig

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit has its survey."""
        return open_survey(self.out, unit, self.clean) is not None

    def open(self) -> Callable[[Unit, Report], None]:
        """Nothing has to be loaded."""
        duplicates.require_library(self.clean)
        return self._survey

    def _survey(self, unit: Unit, report: Report) -> None:
        passed = 0

        def more(size: int) -> None:
            nonlocal passed
            passed += size
            report(passed, 0)

        survey_unit(self.out, unit, self.clean, more)


def is_decided(out: Path, units: list[Unit]) -> bool:
    """Whether every unit's duplicates are known; the folder's specification covers the units and the filters."""
    folder = out / FOLDER
    return (folder / duplicates.REPORT_FILE).is_file() and all(
        (folder / f"{unit.name}.dropped.npy").is_file() for unit in units
    )


def decide_duplicates(out: Path, units: list[Unit], config: CleanConfig) -> None:
    """Write what each unit drops. One process at a time.

    Raises:
        DataError: a survey is missing.
    """
    duplicates.decide(out, units, config)


def dropped_documents(out: Path, unit: Unit, config: CleanConfig) -> dict[int, str]:
    """Ordinals of the documents that a unit drops as duplicates, with the reason."""
    return duplicates.dropped(out, unit) if removes_duplicates(config) else {}


def discard_surveys(out: Path, units: list[Unit]) -> None:
    """Delete the surveys, which are large and have done their work; what was decided stays."""
    for unit in units:
        survey_path(out, unit.name).unlink(missing_ok=True)
