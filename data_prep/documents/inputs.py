"""Whether an input is still the file that was planned, and that other units were built from.

Nobody can hash terabytes before each start. So the system is asked: size, times and inode of a file. What it calls the
change time cannot be set by hand, so an edit that restores size and modification time is seen too. Each unit keeps what
it saw, `units/.UNIT.inputs`, until the dataset is finished; recheck.py reads units again whose inputs look different.

Change time and inode are facts of one host: on another one, only size and modification time are compared.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from data_prep.readers.base import Input
from data_prep.units import Unit, fingerprint_file, identity
from rxt_dist.errors import DataError
from rxt_dist.files import write_json_atomic

Identities = list[list[int]]
SUFFIX = ".inputs"
# Size and time of modification, of what `identity` tells of a file.
_ON_ALL_HOSTS = 2


def files_of(unit: Unit) -> list[Input]:
    """The files that a unit reads, in order, each once; datasets of the `datasets` library keep a fingerprint."""
    return [item for item in dict.fromkeys(part.input for part in unit.slices) if item.hub is None]


def identities(unit: Unit) -> Identities | None:
    """What the system says of the unit's files now; None where one is gone."""
    try:
        return [list(identity(os.stat(item.path))) for item in files_of(unit)]
    except OSError:
        return None


def require_planned(unit: Unit) -> Identities:
    """The identities of a unit's files before they are read.

    Raises:
        DataError: a file is not the one that was planned.
    """
    found = identities(unit)
    for number, item in enumerate(files_of(unit)):
        if found is None or (item.seen != tuple(found[number]) and not _is_planned(item)):
            raise DataError(
                f"{item.path} is not the file that was planned any more: it was changed or removed. Restore it, or "
                f"build into another folder. Finished units are kept."
            )
    return found or []


def _is_planned(item: Input) -> bool:
    try:
        return os.stat(item.path).st_size == item.bytes and fingerprint_file(Path(item.path)) == item.fingerprint
    except OSError:
        return False


def require_unchanged(unit: Unit, before: Identities) -> None:
    """Raise DataError if a file of the unit was written to since `require_planned`.

    A change time alone, as of a new link or other rights, makes recheck.py read the unit again at the end.
    """
    after = identities(unit) or [[]] * len(before)
    for item, old, new in zip(files_of(unit), before, after, strict=True):
        if old[:_ON_ALL_HOSTS] != new[:_ON_ALL_HOSTS]:
            raise DataError(
                f"{item.path} was changed while unit {unit.name} was read from it. Run the same command again when "
                f"nothing writes to it. Finished units are kept."
            )


def record_path(out: Path, unit: Unit) -> Path:
    return out / "units" / f".{unit.name}{SUFFIX}"


def keep_record(out: Path, unit: Unit, seen: Identities) -> None:
    """Keep what a unit saw of its files; before its manifest, so that a finished unit has it."""
    write_json_atomic(record_path(out, unit), {"host": socket.gethostname(), "files": seen})


def is_as_recorded(out: Path, unit: Unit) -> bool:
    """Whether the system says of all files of a finished unit what it said when it was built."""
    try:
        record = json.loads(record_path(out, unit).read_text(encoding="utf-8"))
        host, kept = record["host"], record["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    facts = None if host == socket.gethostname() else _ON_ALL_HOSTS
    return [file[:facts] for file in kept] == [file[:facts] for file in identities(unit) or ()]


def discard_records(out: Path) -> None:
    """The dataset is finished: its root digest vouches for it from now on."""
    for record in (out / "units").glob(f".*{SUFFIX}"):
        record.unlink(missing_ok=True)
