"""Hashes of the files that interactions are read from: each file is hashed once, whichever tasks an array has.

A record in the folder keeps them while it is built, each with what the system said of the file: one that was written to
since is hashed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3

from data_prep.building.workers import Progress, Show
from data_prep.readers.base import Input
from rxt_dist.errors import DataError
from rxt_dist.files import write_json_atomic

_RECORD = ".hashes.json"
_BLOCK = 16 << 20


def with_hashes(out: Path, inputs: Sequence[Input], show: Show, keep: bool) -> list[Input]:
    """The inputs with the blake3 of their contents as fingerprint; who calls it is alone in the folder `out`.

    Args:
        keep: whether the record is to be written, for others to find.

    Raises:
        DataError: a file cannot be read.
    """
    known = _known(out)
    new = [item for item in inputs if known.get(item.path, {}).get("seen") != list(item.seen or ())]
    progress = Progress("Hashing", len(new), sum(item.bytes for item in new))
    for item in new:
        digest = blake3()
        for block in _blocks(item):
            digest.update(block)
            progress.done_bytes += len(block)
            show(progress)
        progress.done += 1
        known[item.path] = {"seen": list(item.seen or ()), "blake3": digest.hexdigest()}
    if new and keep:
        write_json_atomic(out / _RECORD, {item.path: known[item.path] for item in inputs})
    return [replace(item, fingerprint=known[item.path]["blake3"]) for item in inputs]


def forget_hashes(out: Path) -> None:
    """The dataset is finished, and states them."""
    (out / _RECORD).unlink(missing_ok=True)


def _known(out: Path) -> dict[str, Any]:
    """What the record says; a damaged one says nothing."""
    try:
        known = json.loads((out / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _blocks(item: Input) -> Iterator[bytes]:
    try:
        with open(item.path, "rb") as file:
            while block := file.read(_BLOCK):
                yield block
    except OSError as error:
        raise DataError(f"{item.path} cannot be read ({error.strerror}). Mend its rights, or leave it out.") from error
