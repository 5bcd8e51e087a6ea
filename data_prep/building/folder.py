"""A dataset folder that is filled unit by unit, for the smaller builders (interactions, imported corpora).

The folder belongs to one specification, `build.json`; one process writes to it at a time; a unit is committed by its
manifest `units/<unit>.json`, written after its shards. Whoever is interrupted runs the same command again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rxt_dist.data.manifest import SPLITS, TOKENIZER_FILE, digest_json, sums_file
from rxt_dist.errors import DataError
from rxt_dist.files import require_folder, write_atomic, write_json_atomic
from rxt_dist.locks import Lock, locked

SPEC_FILE = "build.json"


class UnitFolder:
    """The folder, held by this process; make one with `opened`."""

    def __init__(self, root: Path, spec: Mapping[str, Any]) -> None:
        self.root, self.spec_hash = root, digest_json(spec)

    def finished(self, unit: str) -> dict[str, Any] | None:
        """The manifest of a committed unit whose shards still have their sizes; None means: build it."""
        try:
            content: dict[str, Any] = json.loads(self._manifest(unit).read_text(encoding="utf-8"))
            shards = [shard for source in content["sources"] for split in SPLITS for shard in source[split]["shards"]]
            sound = all(self._is_there(shard) for shard in shards) and content["spec_hash"] == self.spec_hash
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return content if sound else None

    def commit(self, unit: str, content: Mapping[str, Any]) -> None:
        """Write the unit's manifest (`content` has its `sources`); its shards must be in place."""
        write_json_atomic(self._manifest(unit), {**content, "spec_hash": self.spec_hash})

    def _manifest(self, unit: str) -> Path:
        return self.root / "units" / f"{unit}.json"

    def _is_there(self, shard: Mapping[str, Any]) -> bool:
        has_sums = "row_sums_blake3" not in shard or (self.root / sums_file(shard["file"])).is_file()
        return (self.root / shard["file"]).stat().st_size == shard["bytes"] and has_sums


@contextmanager
def opened(root: Path, spec: Mapping[str, Any], tokenizer_json: str) -> Iterator[UnitFolder]:
    """Hold `root` for a build of `spec`, in which the tokenizer's text is put; the system lets go of it when this
    process ends, however it ends.

    Raises:
        DataError: another process is writing there, or the folder belongs to something else.
        ConfigError: `root` cannot be written to.
    """
    require_folder(root)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / ".lock") as lock:
        if lock is Lock.BUSY:
            raise DataError(f"Another build is writing to {root}. Wait for it, or choose another --out.")
        _check_spec(root, spec)
        for leftover in root.rglob(".*.tmp.*"):
            leftover.unlink()
        write_atomic(root / TOKENIZER_FILE, tokenizer_json)
        write_json_atomic(root / SPEC_FILE, dict(spec))
        # After the specification: until that is there, only the tokenizer tells the folder from somebody else's.
        (root / "units").mkdir(exist_ok=True)
        yield UnitFolder(root, spec)


def _check_spec(root: Path, spec: Mapping[str, Any]) -> None:
    path = root / SPEC_FILE
    if not path.is_file():
        foreign = sorted(item.name for item in root.iterdir() if not item.name.startswith("."))
        if foreign and foreign != [TOKENIZER_FILE]:
            raise DataError(f"{root} is not empty and is not a dataset (it holds {foreign[:5]}). Choose another --out.")
        return
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Choose another --out, or delete {root}.") from error
    differences = [_difference(key, old.get(key), spec.get(key)) for key in sorted({*old, *spec})
                   if old.get(key) != spec.get(key)]  # fmt: skip
    if differences:
        raise DataError(
            f"{root} was built with another specification: {'; '.join(differences)}. A dataset is never changed in "
            f"place: choose another --out, or delete the folder."
        )


def _difference(key: str, old: Any, new: Any) -> str:
    if key != "inputs" or old is None or new is None:
        return f"{key} was {old} and is now {new}"
    before, now = ({item["file"]: item["blake3"] for item in side} for side in (old, new))
    changed = [f"{name} ({'new' if name not in before else 'gone' if name not in now else 'other content'})"
               for name in sorted({*before, *now}) if before.get(name) != now.get(name)]  # fmt: skip
    return f"the input files differ: {', '.join(changed[:5])}{', ...' if len(changed) > 5 else ''}"
