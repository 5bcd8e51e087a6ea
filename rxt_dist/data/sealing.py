"""Sealing a dataset: its manifest, written last, and a spare copy of every small file.

Shards can be built again from their inputs, row checksums from their shards. The small files (tokenizer, plan,
manifests of units, reports) are not worth that risk: `spare.zip` holds a second copy of each, uncompressed and with
fixed dates, so that equal files give an equal archive. `dataset.json` states size and hash of each small file and, as
nothing else vouches for it, a digest of its own content.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import blake3

from rxt_dist.data.dialogues import AnyManifest, DialogueManifest, manifest_of
from rxt_dist.data.manifest import (
    DATASET_FILE,
    SHARD_SUFFIX,
    SUMS_SUFFIX,
    TOKENIZER_FILE,
    DatasetManifest,
    FileInfo,
    digest_json,
)
from rxt_dist.errors import DataError
from rxt_dist.files import write_atomic

SPARE_FILE = "spare.zip"
ManifestT = TypeVar("ManifestT", bound=DatasetManifest | DialogueManifest)

_EPOCH = (1980, 1, 1, 0, 0, 0)
# What the builders write beside shards; of each unit its manifest and the duplicates that it drops.
_SINGLE_FILES = (
    TOKENIZER_FILE,
    "build.json",
    "plan.json",
    "origin.json",
    "clean.json",
    "interactions.json",
    "duplicates/report.json",
)
_UNIT_FILES = ("units/{}.json", "duplicates/{}.dropped.npy")


def finish_dataset(root: Path, manifest: ManifestT, units: Iterable[str]) -> ManifestT:
    """Write `spare.zip` and, last of all, `dataset.json`; both atomically. Returns the manifest with its `files`.

    Args:
        units: names of the units that the dataset consists of. Of the files in the folder only theirs and those that a
            dataset has once belong to it; whatever else lies there does not become part of it.

    Raises:
        DataError: the folder was finished before, under the same specification, with other rows. One of the two is
            wrong, so the manifest that stands there is not replaced.
    """
    before = _finished(root)
    if before and before.spec_hash == manifest.spec_hash and before.root_digest != manifest.root_digest:
        raise DataError(
            f"{root} was finished with root digest {before.root_digest[:16]}, and the same specification gives "
            f"{manifest.root_digest[:16]} now: a file of it is damaged, or an input or a library has changed. "
            f"`rxt-dist data verify {root}` names the files; to keep the new rows, build into another folder."
        )
    contents = {name: (root / name).read_bytes() for name in _own_files(root, units)}
    files = [FileInfo(name, len(content), hash_bytes(content)) for name, content in contents.items()]
    complete = replace(manifest, files=tuple(files))
    text = sealed_json(complete.to_dict())
    write_atomic(root / SPARE_FILE, spare_bytes(contents | {DATASET_FILE: text}))
    write_atomic(root / DATASET_FILE, text)
    return complete


def _finished(root: Path) -> AnyManifest | None:
    """The manifest that stands in the folder, if it is sound."""
    try:
        text = (root / DATASET_FILE).read_bytes()
    except OSError:
        return None
    return manifest_of(text) if is_sealed(text) else None


def _own_files(root: Path, units: Iterable[str]) -> list[str]:
    names = [*_SINGLE_FILES, *(pattern.format(unit) for unit in units for pattern in _UNIT_FILES)]
    return sorted(name for name in names if (root / name).is_file())


def small_files(root: Path) -> list[str]:
    """Every file of the folder that is not hidden, a shard, row checksums, the top manifest or the spare copies."""
    names = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if not any(part.startswith(".") for part in name.parts)
        and name.suffix not in (SHARD_SUFFIX, SUMS_SUFFIX)
        and name.as_posix() not in (DATASET_FILE, SPARE_FILE)
    )


def hash_bytes(content: bytes) -> str:
    """Hex blake3."""
    return str(blake3.blake3(content).hexdigest())


def sealed_json(value: Mapping[str, Any]) -> bytes:
    """The text of `dataset.json`: indented JSON with sorted keys and a `digest` of everything else in it."""
    rest = {key: item for key, item in value.items() if key != "digest"}
    sealed = rest | {"digest": digest_json(rest)}
    return (json.dumps(sealed, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def is_sealed(text: bytes) -> bool:
    """Whether `text` is, byte for byte, what `sealed_json` once returned."""
    try:
        value = json.loads(text)
        return isinstance(value, dict) and sealed_json(value) == text
    except ValueError:
        return False


def spare_bytes(contents: Mapping[str, bytes]) -> bytes:
    """A zip archive of these files that depends on nothing but their names and contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(contents):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), contents[name])
    return buffer.getvalue()


def read_spare(root: Path) -> dict[str, bytes]:
    """What can still be read of the spare copies; a damaged or missing member is left out.

    A member is as written if its checksum says so; what it should be, the manifest states.
    """
    found: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(root / SPARE_FILE) as archive:
            for name in archive.namelist():
                # A damaged archive may ask for any feature of the format: whatever it raises, this member is lost.
                with suppress(Exception):
                    found[name] = archive.read(name)
    except Exception:
        # Not even its directory can be read. Whoever needs a copy finds none; `verify` names the archive by its hash.
        return found
    return found
