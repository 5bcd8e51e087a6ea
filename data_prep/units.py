"""The plan of a build: which parts of which inputs are committed as one.

A plan is a pure function of the inputs and the settings; the number of workers or tasks is not among them. It is
stored with the dataset, so that every later run of the build does the same work, and names what differs if the inputs
have changed.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from data_prep.corpora import CorpusFile, Say, find_files, named_language
from data_prep.languages import language_of_name
from data_prep.readers import extent
from data_prep.readers.base import HubDataset, Input, Slice, Unit
from rxt_dist.config.corpus import BuildConfig, SourceConfig
from rxt_dist.errors import ConfigError, DataError

__all__ = ["Input", "Plan", "Slice", "Unit", "fingerprint_file", "make_plan", "reading_problem"]

PLAN_VERSION = 1
# Of the rules by which texts are read: 1 took the language from a folder's name where the text did not tell it, and 2
# always does. A plan that states none has 1.
READING_VERSION = 2
_MIN_UNIT_BYTES, _MAX_UNIT_BYTES, _UNITS_WANTED = 16_000_000, 256_000_000, 64
_PIECES_PER_UNIT = 16
_LEAST_PIECE_BYTES = 1000  # smaller parts of a .jsonl mostly hold the beginning of no line
_PROBES, _PROBE_BYTES = 16, 64 << 10


@dataclass(frozen=True)
class Plan:
    """All inputs and units of a build, in order, and by which rules they are read, which is no difference of plans."""

    inputs: tuple[Input, ...]
    units: tuple[Unit, ...]
    reading: int = READING_VERSION

    @property
    def text_bytes(self) -> int:
        return sum(unit.text_bytes for unit in self.units)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a slice names its input by number."""
        number = {item: index for index, item in enumerate(self.inputs)}
        return {
            "format": "rxt-plan",
            "version": PLAN_VERSION,
            "inputs": [item.to_dict() for item in self.inputs],
            "units": [
                {
                    "name": unit.name,
                    "text_bytes": unit.text_bytes,
                    "slices": [[number[p.input], p.start, p.stop, p.text_bytes] for p in unit.slices],
                }
                for unit in self.units
            ],
            **({} if self.reading == 1 else {"reading": self.reading}),
        }

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            DataError: not a plan, or one of another version of this program.
        """
        try:
            if (value["format"], value["version"]) != ("rxt-plan", PLAN_VERSION):
                raise DataError(f"The plan has version {value['version']}; this program reads {PLAN_VERSION}.")
            if (reading := value.get("reading", 1)) > READING_VERSION:
                raise DataError(f"The plan has rules of version {reading}; this program knows {READING_VERSION}.")
            inputs = tuple(Input.from_dict(item) for item in value["inputs"])
            units = tuple(
                Unit(
                    unit["name"],
                    tuple(Slice(inputs[index], *numbers) for index, *numbers in unit["slices"]),
                    unit["text_bytes"],
                )
                for unit in value["units"]
            )
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise DataError(f"The plan is damaged ({error!r}). Delete the file, or choose another folder.") from error
        return Plan(inputs, units, reading)

    def differences(self, other: Plan) -> list[str]:
        """How `other` differs, a line an input: `-a.parquet`, `+b.parquet`, `c.parquet (content)`.

        Empty for plans that give the same units; where the files lie is no difference.
        """
        before, now = _keyed(self), _keyed(other)
        lines = [f"-{key}" for key in before if key not in now] + [f"+{key}" for key in now if key not in before]
        for key in before.keys() & now.keys():
            old, new = before[key], now[key]
            if (old.bytes, old.fingerprint) != (new.bytes, new.fingerprint):
                lines.append(f"{key} (content)")
            elif replace(old, path="") != replace(new, path=""):
                lines.append(f"{key} (read in another way)")
        if not lines and self.to_dict()["units"] != other.to_dict()["units"]:
            lines.append("the sizes of the units")
        return sorted(lines)


def _keyed(plan: Plan) -> dict[str, Input]:
    """The inputs by source and name; of equal names, which folders of one name give, the later ones have a number."""
    keyed: dict[str, Input] = {}
    seen: Counter[str] = Counter()
    for item in plan.inputs:
        key = f"{item.source}: {item.name}" if item.source else item.name
        seen[key] += 1
        keyed[f"{key} ({seen[key]})" if seen[key] > 1 else key] = item
    return keyed


def make_plan(config: BuildConfig, inputs: Sequence[Path] = (), say: Say = lambda line: None) -> Plan:
    """Find, look into and cut up what is to be built: the sources of `config`, or `inputs` where there are any.

    From `inputs` each language becomes a source. Every input is opened, so that a missing column or a truncated table
    is told before the work and not in the middle of it.

    Args:
        say: told what is passed over.

    Raises:
        DataError: an input that does not exist, cannot be read, lacks a column, or belongs to two sources.
        ConfigError: neither sources nor inputs.
    """
    if not inputs and not config.sources:
        raise ConfigError("There is nothing to build: give build.sources in the data file, or inputs.")
    bound = int(config.max_document_mb * 1e6)
    if inputs:
        asked = _plain_inputs(inputs, bound, say)
    else:
        asked = [item for source in config.sources for item in _source_inputs(source, bound, say)]
    _refuse_twice(asked)
    extents = [extent(item) for item in asked]
    wanted = unit_bytes(config, sum(found.text_bytes for found in extents))
    grain = max(wanted // _PIECES_PER_UNIT, _LEAST_PIECE_BYTES)
    units = group((piece for found in extents for piece in found.pieces(grain)), wanted)
    return Plan(tuple(found.input for found in extents), tuple(units))


def reading_problem(reading: int, units: Iterable[Unit]) -> str | None:
    """Why units that were planned by the rules `reading` may come out differently now; None: they do not."""
    if reading == READING_VERSION:
        return None
    for item in dict.fromkeys(part.input for unit in units for part in unit.slices):
        # Without folders only the name of the file is left, which was always followed.
        of_file = language_of_name(item.name.rpartition("/")[2])
        if item.language is None and not of_file == language_of_name(item.name) == named_language(item):
            return (
                f"it was begun by an earlier version of this program, which guessed the languages of texts where this "
                f"one goes by the names of folders, as for {item.name}"
            )
    return None


def unit_bytes(config: BuildConfig, text_bytes: int) -> int:
    """Text a unit: as configured, or a 64th of the whole, 16 to 256 MB."""
    if config.unit_mb is not None:
        return max(int(config.unit_mb * 1e6), 1)
    return min(max(text_bytes // _UNITS_WANTED, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)


def group(pieces: Iterable[Slice], wanted: int) -> list[Unit]:
    """Consecutive pieces as units of at least `wanted` bytes of text; a unit never holds pieces of two sources.

    Neighbouring pieces of one input become one slice.
    """
    units: list[Unit] = []
    held: list[Slice] = []
    size = 0

    def close() -> None:
        nonlocal size
        if held:
            units.append(Unit(f"u{len(units):05d}", tuple(held), size))
            held.clear()
            size = 0

    for piece in pieces:
        last = held[-1] if held else None
        if last is not None and last.input.source != piece.input.source:
            close()
        elif last is not None and last.input is piece.input:
            held.pop()
            size -= last.text_bytes
            piece = Slice(piece.input, last.start, piece.stop, last.text_bytes + piece.text_bytes)
        held.append(piece)
        size += piece.text_bytes
        if size >= wanted:
            close()
    close()
    return units


def _plain_inputs(inputs: Sequence[Path], max_document_bytes: int, say: Say) -> list[Input]:
    return [_file_input(file, Input("", "", max_document_bytes)) for file in find_files(inputs, say)]


def _source_inputs(source: SourceConfig, max_document_bytes: int, say: Say) -> list[Input]:
    common = Input(
        name="",
        path="",
        max_document_bytes=max_document_bytes,
        source=source.name,
        language=source.language,
        text_column=source.text_column,
        language_column=source.language_column,
    )
    if source.dataset is None:
        return [_file_input(file, common) for file in find_files(source.inputs, say)]
    asked = HubDataset(source.config, source.revision, source.split, source.data_files)
    details = [source.config, source.revision, source.split, *source.data_files]
    name = "/".join([source.dataset, *(detail for detail in details if detail)])
    return [replace(common, name=name, path=source.dataset, hub=asked)]


def _file_input(file: CorpusFile, common: Input) -> Input:
    try:
        status, fingerprint = file.path.stat(), fingerprint_file(file.path)
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error}. Mend its rights, or leave it out.") from error
    return replace(
        common,
        name=file.name,
        path=str(file.path),
        bytes=status.st_size,
        fingerprint=fingerprint,
        seen=identity(status),
    )


def _refuse_twice(inputs: Sequence[Input]) -> None:
    """Refuse an input that two sources name: its tokens would be trained on as if they were two corpora's."""
    owners: dict[tuple[str, HubDataset | None], str | None] = {}
    for item in inputs:
        path = item.path if item.hub else os.path.realpath(item.path)
        owner = owners.setdefault((path, item.hub), item.source)
        if owner != item.source:
            raise DataError(
                f"{item.path} belongs to the sources '{owner}' and '{item.source}'; an input may be read by one source "
                f"only. Mend the inputs of one of them."
            )


def identity(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another, and from itself after an edit: size, times of modification and change, inode."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def require_as_seen(item: Input) -> None:
    """Refuse a file that was written to since it was looked at, before a unit of what is there now is committed."""
    try:
        same = identity(os.stat(item.path)) == item.seen
    except OSError:
        same = False
    if not same:
        raise DataError(
            f"{item.path} was changed while the dataset was built. Restore it and run the same command again, or "
            f"build into another folder when nothing writes to the file."
        )


def fingerprint_file(path: Path) -> str:
    """Hex blake3 over up to 16 evenly spaced blocks of 64 KiB, the first and the last among them.

    That is all of a file of up to 1 MiB. Hashing half a terabyte before each start is not possible; this notices
    another version of a file, not one flipped bit in its middle: for that, units have a digest of their documents, and
    documents/inputs.py what the system says of the file.
    """
    digest = blake3()
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "little"))
    with open(path, "rb") as file:
        if size <= _PROBES * _PROBE_BYTES:
            digest.update(file.read())
        else:
            for probe in range(_PROBES):
                file.seek((size - _PROBE_BYTES) * probe // (_PROBES - 1))
                digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()
