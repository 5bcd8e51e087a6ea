"""Mending a dataset: small files from their copies, row checksums from their shards, shards from their texts.

Nothing in the folder is touched before its replacement is known to be right, bit by bit: a unit is built again in a
hidden folder beside the shards, and only files whose hashes are those of the manifest take their place.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.building.builder import UnitWork
from data_prep.building.folder import ORIGIN_FILE, SPEC_FILE, UNITS_FOLDER
from data_prep.building.workers import Progress, run_units
from data_prep.documents.unit import DocumentWork
from data_prep.shards.repack import RepackWork
from data_prep.shards.rows import read_unchecked, unit_name
from data_prep.shards.system_errors import dataset_errors
from data_prep.shards.trace import build_settings, clean_settings, input_problem, read_json, stored_plan, stored_unit
from data_prep.units import Unit, reading_problem
from rxt_dist.data.dialogues import AnyManifest, DialogueManifest, load_any_manifest
from rxt_dist.data.manifest import (
    DATASET_FILE,
    TOKENIZER_FILE,
    DatasetManifest,
    ShardInfo,
    digest_json,
    load_manifest,
    sums_file,
)
from rxt_dist.data.origin import maker
from rxt_dist.data.rows import row_sums
from rxt_dist.data.sealing import SPARE_FILE, hash_bytes, is_sealed, read_spare
from rxt_dist.data.verify import AnyShard, Finding, Report, expected_spare
from rxt_dist.data.writer import ShardSpec
from rxt_dist.errors import DataError, UserError
from rxt_dist.files import blake3_file, fsync_dir, require_free_space, write_atomic
from rxt_dist.locks import Lock, locked

_SCRATCH = ".repair"
_DUPLICATES = "duplicates"
_NO_PLAN = "it was not built from texts, and the folder does not keep where its inputs lie"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Repaired:
    """What a repair did: files restored, and what could not be (with the reason)."""

    restored: tuple[str, ...]
    failed: tuple[Finding, ...]


def repair(
    dataset: Path,
    report: Report,
    say: Say = lambda line: None,
    progress: Callable[[int, int], None] = lambda a, b: None,
) -> Repaired:
    """Mend what a full verification found: small files from their spare copies, row checksums from their shards,
    shards from their texts (or, where they were repacked, from the first dataset).

    Args:
        report: of `verify_full`, made just now.
        progress: told bytes of text read and in all, for each unit that is built again.

    Raises:
        DataError: another process holds the folder, the manifest is lost in both copies, or something cannot be read or
            written.
        DiskError: the disk is full.
    """
    with dataset_errors(dataset), locked(dataset / ".lock") as state:
        if state is Lock.BUSY:
            raise DataError(f"Another process is writing to {dataset}. Wait for it.")
        if report.manifest is None:
            raise DataError(
                f"{dataset / DATASET_FILE} and its copy in {SPARE_FILE} are both damaged. Run the same "
                f"`{maker(dataset)}` again: it writes both anew from the finished units."
            )
        restored = _restore_small(dataset, report.manifest, report.findings)
        manifest = load_any_manifest(dataset)
        left = [finding for finding in report.findings if finding.file not in restored]
        if isinstance(manifest, DatasetManifest):
            restored += _restore_sums(dataset, manifest, {finding.file for finding in left})
        left = [finding for finding in left if finding.file not in restored]
        shards: dict[str, AnyShard] = {shard.file: shard for shard in manifest.shards()}
        lost = [shard for file, shard in shards.items() for finding in left
                if finding.file in (file, sums_file(file))]  # fmt: skip
        of_shards = {name for shard in lost for name in (shard.file, sums_file(shard.file))}
        failed = [finding for finding in left if finding.file not in of_shards]
        done, not_built = _restore_shards(dataset, manifest, lost, say, progress)
    return Repaired(tuple(sorted({*restored, *done})), (*failed, *not_built))


def _restore_small(dataset: Path, manifest: AnyManifest, findings: tuple[Finding, ...]) -> list[str]:
    damaged = {finding.file for finding in findings}
    spare = read_spare(dataset)
    restored = []
    for item in manifest.files:
        content = spare.get(item.file)
        if item.file in damaged and content is not None and hash_bytes(content) == item.blake3:
            (dataset / item.file).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(dataset / item.file, content)
            restored.append(item.file)
    text = spare.get(DATASET_FILE)
    if DATASET_FILE in damaged and text is not None and is_sealed(text):
        write_atomic(dataset / DATASET_FILE, text)
        restored.append(DATASET_FILE)
    whole = expected_spare(dataset, manifest)
    if SPARE_FILE in damaged and whole is not None:
        write_atomic(dataset / SPARE_FILE, whole)
        restored.append(SPARE_FILE)
    return restored


def _restore_sums(dataset: Path, manifest: DatasetManifest, damaged: set[str]) -> list[str]:
    """Row checksums of sound shards are computed again."""
    restored = []
    for shard in manifest.shards():
        name = sums_file(shard.file)
        if name not in damaged or shard.file in damaged:
            continue
        batches = (read_unchecked(dataset, shard, batch, manifest.seq_len) for batch in range(len(shard.batches)))
        content = np.concatenate([row_sums(rows) for rows in batches]).tobytes()
        if hash_bytes(content) == shard.row_sums_blake3:
            write_atomic(dataset / name, content)
            restored.append(name)
    return restored


def _restore_shards(
    dataset: Path,
    manifest: AnyManifest,
    lost: list[AnyShard],
    say: Say,
    progress: Callable[[int, int], None],
) -> tuple[list[str], list[Finding]]:
    """Shards are built again, unit by unit: what was restored, and what could not be."""
    if isinstance(manifest, DialogueManifest):
        return [], [Finding(shard.file, f"cannot be built again: {_NO_PLAN}") for shard in lost]
    restored: list[str] = []
    failed: list[Finding] = []
    rows = [shard for shard in lost if isinstance(shard, ShardInfo)]
    for unit in sorted({unit_name(shard) for shard in rows}):
        mine = [shard for shard in dict.fromkeys(rows) if unit_name(shard) == unit]
        say(f"Building unit {unit} again for {', '.join(shard.file for shard in mine)}")
        done, problem = _rebuild(dataset, manifest, unit, mine, progress)
        restored += done
        failed += [Finding(shard.file, f"cannot be built again: {problem}") for shard in mine if problem]
    return restored, failed


def _rebuild(
    dataset: Path,
    manifest: DatasetManifest,
    name: str,
    lost: list[ShardInfo],
    progress: Callable[[int, int], None],
) -> tuple[list[str], str | None]:
    """Build a unit again beside the dataset and put its lost files in place; what was restored, why not the rest."""
    scratch = dataset / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        shards = [shard for shard in manifest.shards() if unit_name(shard) == name]
        require_free_space(dataset, sum(shard.bytes for shard in shards), "Building the unit again")
        work, unit = _rebuilder(dataset, manifest, name, scratch)
        (scratch / UNITS_FOLDER).mkdir(parents=True)
        shutil.copyfile(dataset / TOKENIZER_FILE, scratch / TOKENIZER_FILE)
        if (dataset / _DUPLICATES).is_dir():
            (scratch / _DUPLICATES).symlink_to((dataset / _DUPLICATES).resolve(), target_is_directory=True)
        state = Progress("Building again", 1, unit.text_bytes)
        run_units(work, [unit], 1, state, lambda now: progress(now.bytes, now.total_bytes), patient=True)
        return _put_in_place(dataset, scratch, lost)
    except UserError as error:
        return [], str(error).rstrip(".")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _rebuilder(dataset: Path, manifest: DatasetManifest, name: str, scratch: Path) -> tuple[UnitWork, Unit]:
    """What builds a unit again in `scratch`, and the unit.

    Raises:
        DataError: that is not possible.
    """
    spec = ShardSpec(
        manifest.seq_len, manifest.vocab_size, manifest.tokenizer_sha256, manifest.packing_version, manifest.spec_hash
    )
    origin = dataset / ORIGIN_FILE
    if origin.is_file():
        return _repacker(dataset, Path(read_json(origin)["dataset"]), spec, name, scratch)
    unit = stored_unit(dataset, name)
    if unit is None:
        raise DataError(_NO_PLAN)
    problem = input_problem(unit)
    other = reading_problem(stored_plan(dataset).reading, [unit])
    if problem is None and other is not None:
        problem = f"{other}; repair it with that version, or build into another folder"
    if problem:
        raise DataError(problem)
    fraction = build_settings(dataset)["eval_fraction"]
    return DocumentWork(scratch, spec, fraction, "tokenizers", clean_settings(dataset), threads=True), unit


def _repacker(dataset: Path, first: Path, spec: ShardSpec, name: str, scratch: Path) -> tuple[UnitWork, Unit]:
    settings = read_json(dataset / SPEC_FILE)
    if not (first / DATASET_FILE).is_file():
        raise DataError(f"the dataset {first}, of which it was repacked, is gone")
    old = load_manifest(first)
    if old.root_digest != settings["repacked_from"]:
        raise DataError(f"{first}, of which it was repacked, is another dataset now")
    assert digest_json(settings) == spec.spec_hash, "build.json is sound, so it is what the shards were made with"
    size = sum(shard.bytes for shard in old.shards() if unit_name(shard) == name)
    return RepackWork(scratch, spec, first, old.seq_len), Unit(name, (), size)


def _put_in_place(dataset: Path, scratch: Path, lost: list[ShardInfo]) -> tuple[list[str], str | None]:
    restored, other = [], []
    for shard in lost:
        pairs = ((shard.file, shard.blake3), (sums_file(shard.file), shard.row_sums_blake3))
        if not all((scratch / file).is_file() and blake3_file(scratch / file) == wanted for file, wanted in pairs):
            other.append(shard.file)
            continue
        (dataset / shard.file).parent.mkdir(parents=True, exist_ok=True)
        # The checksums first, as a shard is only looked at with them.
        for file, _ in reversed(pairs):
            (scratch / file).replace(dataset / file)
            restored.append(file)
        fsync_dir((dataset / shard.file).parent)
    problem = (
        f"{', '.join(other)} came out differently: either the inputs or filters are not what they were, or a library "
        f"(pyarrow, tokenizers) has another version than when it was built"
        if other
        else None
    )
    return restored, problem
