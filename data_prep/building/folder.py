"""The folder that a dataset is built in: who may write to it, whose it is, and which of its units are finished.

build.json       the specification: all that decides the rows; a folder is never changed to another one
plan.json        which parts of which inputs make a unit
origin.json      of which dataset it was packed again
units/*.json     the manifest of a unit is its commit: a shard that no manifest names does not exist
.lock            held by one build, or shared by the tasks of an array
.setup.lock      held by the one task that does what is done once
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rxt_dist.data.manifest import SPLITS, TOKENIZER_FILE, sums_file, tokenizer_fingerprint
from rxt_dist.errors import DataError
from rxt_dist.files import write_json_atomic
from rxt_dist.locks import Lock, locked

SPEC_FILE, PLAN_FILE, ORIGIN_FILE = "build.json", "plan.json", "origin.json"
UNITS_FOLDER = "units"
KEPT = "Finished units are kept."

_LOCK, _SETUP_LOCK = ".lock", ".setup.lock"
_ROW_SUM_BYTES = 8

Say = Callable[[str], None]


# ---------------------------------------------------------------------------------------------------------------------
# Who may write
# ---------------------------------------------------------------------------------------------------------------------


@contextmanager
def held(out: Path, array: bool, say: Say) -> Iterator[None]:
    """Hold the folder: alone, or (`array`) together with the other tasks; the system lets go of it when this process
    ends, however it ends.

    Raises:
        DataError: another build holds it.
    """
    with locked(out / _LOCK, shared=array) as state:
        if state is Lock.BUSY:
            raise DataError(f"Another build is writing to {out}. Wait for it, or choose another --out.")
        if state is Lock.UNSUPPORTED:
            say(f"The file system of {out} knows no locks: a unit may be built twice, and comes out the same.")
        elif not array:
            _unlink(out.rglob(".*.tmp.*"))
        yield


@contextmanager
def alone(out: Path, say: Say) -> Iterator[None]:
    """Alone among the tasks, for what is done once: setting up, training a tokenizer, merging."""
    with locked(out / _SETUP_LOCK) as state:
        if state is Lock.BUSY:
            say("Waiting for another task, which prepares or finishes the dataset")
        else:
            yield from _tidied(out, state)
            return
    with locked(out / _SETUP_LOCK, wait=True) as state:
        yield from _tidied(out, state)


def _tidied(out: Path, state: Lock) -> Iterator[None]:
    if state is Lock.TAKEN:  # only who holds this lock writes there
        _unlink(out.glob(".*.tmp.*"))
    yield


# ---------------------------------------------------------------------------------------------------------------------
# Whose it is
# ---------------------------------------------------------------------------------------------------------------------


def require_ours(out: Path) -> None:
    """Raise DataError if something else than a dataset lies in the folder."""
    found = sorted(item.name for item in out.iterdir() if not item.name.startswith("."))
    if SPEC_FILE not in found and set(found) - {TOKENIZER_FILE, PLAN_FILE, ORIGIN_FILE}:  # which are there before it
        raise DataError(f"{out} is not empty and is not a dataset (it holds {found[:5]}). Choose another --out.")


def read_stored(path: Path) -> dict[str, Any]:
    """A JSON file of the folder.

    Raises:
        DataError: it is damaged.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Choose another --out, or delete {path.parent}.") from error
    return value


def stored_fingerprint(out: Path) -> str | None:
    """That of the folder's tokenizer; None where it is lost or damaged."""
    try:
        return tokenizer_fingerprint((out / TOKENIZER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# Its units
# ---------------------------------------------------------------------------------------------------------------------


def unit_path(out: Path, unit: str) -> Path:
    """The unit's manifest."""
    return out / UNITS_FOLDER / f"{unit}.json"


def lock_path(out: Path, unit: str) -> Path:
    """What is locked by who works on the unit."""
    return out / UNITS_FOLDER / f".{unit}.lock"


def commit_unit(out: Path, unit: str, spec_hash: str, content: Mapping[str, Any]) -> None:
    """Write the unit's manifest (`content` has its `sources`); its shards must be in place."""
    write_json_atomic(unit_path(out, unit), {**content, "spec_hash": spec_hash})


def finished_unit(out: Path, unit: str, spec_hash: str) -> dict[str, Any] | None:
    """The unit's manifest if it is committed and its shards still have their sizes; None means: build it."""
    try:
        content: dict[str, Any] = json.loads(unit_path(out, unit).read_text(encoding="utf-8"))
        shards = [shard for s in content["sources"] for split in SPLITS for shard in s[split]["shards"]]
        sound = all(_is_there(out, shard) for shard in shards)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content if sound and content.get("spec_hash") == spec_hash else None


def _is_there(out: Path, shard: Mapping[str, Any]) -> bool:
    if (out / shard["file"]).stat().st_size != shard["bytes"]:
        return False
    # Dialogues have no checksums of rows.
    return "rows" not in shard or (out / sums_file(shard["file"])).stat().st_size == shard["rows"] * _ROW_SUM_BYTES


def remove_leftovers(out: Path, unit: str) -> None:
    """Delete temporary files of a unit that nobody is building (the caller holds its lock)."""
    for pattern in (f"*/*/.{unit}-*.tmp.*", f"*/.{unit}.*.tmp.*", f"*/..{unit}.*.tmp.*"):
        _unlink(out.glob(pattern))


def remove_locks(out: Path) -> None:
    """All units are finished, so nobody asks for their locks any more."""
    _unlink((out / UNITS_FOLDER).glob(".*.lock"))


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
