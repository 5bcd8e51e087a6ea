"""From a token back to its text: the plan, settings and inputs that a dataset folder remembers.

A shard's segments hold (unit, ordinal); the plan says which parts of which inputs a unit is, and a document's ordinal
is its number in them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.building.encode import TokenizersBackend
from data_prep.building.folder import ORIGIN_FILE, PLAN_FILE, SPEC_FILE
from data_prep.cleaning.clean import Cleaner
from data_prep.cleaning.deduplicate import dropped_documents
from data_prep.corpora import Document, ReadCounts, read_unit
from data_prep.shards.rows import gather, pieces_of, read_unchecked, unit_name
from data_prep.units import Plan, Unit, fingerprint_file
from rxt_dist.config.clean import CleanConfig
from rxt_dist.data.manifest import SPLITS, TOKENIZER_FILE, DatasetManifest, ShardInfo
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.data.verify import shard_problem
from rxt_dist.errors import DataError


def stored_plan(dataset: Path) -> Plan:
    """The plan of the build; one without units where the folder keeps none (it was not built from text).

    Raises:
        DataError: the plan is damaged.
    """
    path = dataset / PLAN_FILE
    return Plan.from_dict(read_json(path)) if path.is_file() else Plan((), ())


def stored_unit(dataset: Path, name: str) -> Unit | None:
    """A unit as planned, or None where the folder keeps no plan or not this unit.

    Raises:
        DataError: the plan is damaged.
    """
    return next((unit for unit in stored_plan(dataset).units if unit.name == name), None)


def build_settings(dataset: Path) -> dict[str, Any]:
    """The settings of the build from text: `build.json`, or for repacked shards that of the first dataset.

    Raises:
        DataError: the file is damaged.
    """
    origin = dataset / ORIGIN_FILE
    if origin.is_file():
        found: dict[str, Any] = read_json(origin)["build"]
        return found
    return read_json(dataset / SPEC_FILE)


def clean_settings(dataset: Path) -> CleanConfig | None:
    """The filters of the build; None where it had none."""
    config = CleanConfig.model_validate(build_settings(dataset).get("clean") or {})
    return None if config == CleanConfig() else config


def input_problem(unit: Unit) -> str | None:
    """Why a unit cannot be read as it once was: an input that is gone or changed; None if nothing is known."""
    for item in dict.fromkeys(part.input for part in unit.slices):
        if item.hub is not None:
            continue
        path = Path(item.path)
        if not path.is_file():
            return f"{path} is gone"
        if path.stat().st_size != item.bytes or fingerprint_file(path) != item.fingerprint:
            return f"{path} has changed since the build"
    return None


def documents_of(dataset: Path, name: str, ordinals: list[int]) -> dict[int, Document]:
    """Documents of a unit by ordinal, read again from their source, as they are before cleaning.

    Raises:
        DataError: the plan does not know the unit, or its inputs are gone or changed.
    """
    unit = stored_unit(dataset, name)
    problem = input_problem(unit) if unit else "the folder keeps no plan that knows it"
    if unit is None or problem:
        raise DataError(f"Unit {name} of {dataset} cannot be traced to its text: {problem}.")
    wanted, found = set(ordinals), {}
    for ordinal, document in enumerate(read_unit(unit, ReadCounts())):
        if ordinal in wanted:
            found[ordinal] = document
            if len(found) == len(wanted):
                break
    return found


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of the folder.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}). `rxt-dist data verify --repair` restores it.") from error
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Deep verification
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mismatch:
    """A document whose tokens are not those of its text. `id` is empty where its source has no such document."""

    unit: str
    document: int
    id: str
    problem: str


@dataclass(frozen=True)
class DeepReport:
    """Of `asked` documents, or all of the dataset's where it has fewer, `documents` were compared token for token;
    `tokens` were equal. `untraced` are units whose text cannot be read, with the reason, and how many of the chosen
    documents are theirs."""

    asked: int
    documents: int
    tokens: int
    mismatches: tuple[Mismatch, ...]
    untraced: tuple[tuple[str, str], ...]
    untraced_documents: int


@dataclass(frozen=True)
class _Sample:
    """Documents of one unit, source and split that were chosen, by ordinal; `shards` are all of these."""

    unit: str
    shards: tuple[ShardInfo, ...]
    documents: list[int]


def verify_deep(
    dataset: Path,
    manifest: DatasetManifest,
    count: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DeepReport:
    """Read `count` different random documents (all, where there are fewer) again from their source, clean and tokenise
    them with the reference tokenizer, and compare every token with the shards.

    Args:
        seed: chooses the documents.
        progress: told bytes done and in all: of the shards that are looked at, which are hashed first, and of text, as
            far as the plan knows it.

    Raises:
        DataError: a shard is damaged.
    """
    samples = _choose(dataset, manifest, count, seed)
    units = sorted({sample.unit for sample in samples})
    sizes = {unit: planned.text_bytes if (planned := stored_unit(dataset, unit)) else 0 for unit in units}
    shards = [shard for sample in samples for shard in sample.shards]
    hashed, total = sum(shard.bytes for shard in shards), sum(shard.bytes for shard in shards) + sum(sizes.values())
    _require_sound(dataset, shards, lambda done: progress(done, total))
    backend = TokenizersBackend(dataset / TOKENIZER_FILE)
    compared = tokens = lost = 0
    mismatches: list[Mismatch] = []
    untraced: dict[str, str] = {}
    for done, unit in enumerate(units):
        mine = [sample for sample in samples if sample.unit == unit]
        numbers = sorted(number for sample in mine for number in sample.documents)
        progress(hashed + sum(sizes[name] for name in units[:done]), total)
        try:
            texts = _texts(dataset, unit, numbers)
        except DataError as error:
            untraced[unit] = str(error)
            lost += len(numbers)
            continue
        for sample in mine:
            for number, stored in _stored(dataset, manifest.seq_len, sample).items():
                traced = texts.get(number)
                problem = _problem(stored, traced, backend)
                compared += 1
                tokens += 0 if problem else len(stored)
                if problem:
                    mismatches.append(Mismatch(unit, number, traced.id if traced else "", problem))
    progress(total, total)
    return DeepReport(count, compared, tokens, tuple(mismatches), tuple(untraced.items()), lost)


@dataclass(frozen=True)
class _Traced:
    """A document read again: its id and, unless it is `dropped` for that reason, its cleaned text."""

    id: str
    text: str
    dropped: str = ""


def _texts(dataset: Path, unit: str, ordinals: list[int]) -> dict[int, _Traced]:
    config = clean_settings(dataset)
    cleaner = Cleaner(config) if config else None
    planned = stored_unit(dataset, unit)
    # What was decided of duplicates stays with the first dataset: whatever was packed again had been kept.
    is_first = not (dataset / ORIGIN_FILE).is_file()
    duplicates = dropped_documents(dataset, planned, config) if config and planned and is_first else {}
    result = {}
    for ordinal, document in documents_of(dataset, unit, ordinals).items():
        cleaned = cleaner.clean(document, duplicates.get(ordinal)) if cleaner else document
        dropped_as = cleaned if isinstance(cleaned, str) else ""
        result[ordinal] = _Traced(document.id, cleaned.text if isinstance(cleaned, Document) else "", dropped_as)
    return result


def _problem(stored: npt.NDArray[np.uint16], traced: _Traced | None, backend: TokenizersBackend) -> str | None:
    """What differs between the tokens of a document in the shards and those of its text; None: nothing."""
    if traced is None:
        return "is not there: its source has fewer documents"
    if traced.dropped:
        return f"is dropped now ({traced.dropped})"
    wanted = np.concatenate(([BOS_ID], backend.encode([traced.text])[0], [EOS_ID]))
    if np.array_equal(stored, wanted):
        return None
    shorter = min(len(stored), len(wanted))
    differing = np.flatnonzero(stored[:shorter] != wanted[:shorter])
    at = int(differing[0]) if len(differing) else shorter
    return f"differs from token {at} on ({len(stored):,} tokens in the shards, {len(wanted):,} from the text)"


def _choose(dataset: Path, manifest: DatasetManifest, count: int, seed: int) -> list[_Sample]:
    """`count` different documents, or all where there are fewer: one of a random row each, until it is enough.

    Rows are read unchecked: who uses the choice hashes their shards first.
    """
    places = [(source, split, shard) for source in manifest.sources for split in SPLITS
              for shard in source.split(split).shards]  # fmt: skip
    ends = np.cumsum([shard.rows for _, _, shard in places])
    rng, rows = np.random.default_rng(seed), int(ends[-1])
    chosen: dict[tuple[str, str, str], set[int]] = {}
    found, size = 0, min(count, rows)
    while found < count:
        before = found
        for row in rng.choice(rows, size, replace=False).tolist():
            index = int(np.searchsorted(ends, row, side="right"))
            source, split, shard = places[index]
            documents = _documents_of_row(dataset, shard, manifest.seq_len, row - int(ends[index] - shard.rows))
            taken = chosen.setdefault((unit_name(shard), source.name, split), set())
            left = sorted(documents - taken)
            if left:
                taken.add(left[int(rng.integers(len(left)))])
                found += 1
            if found == count:
                break
        if found == before and size == rows:
            break  # there are no others
        # A document may lie in several rows, and several in one.
        size = min(2 * size, rows)
    samples = []
    for (unit, name, split), numbers in sorted(chosen.items()):
        source = next(source for source in manifest.sources if source.name == name)
        mine = tuple(shard for shard in source.split(split).shards if unit_name(shard) == unit)
        samples.append(_Sample(unit, mine, sorted(numbers)))
    return samples


def _documents_of_row(dataset: Path, shard: ShardInfo, seq_len: int, row: int) -> set[int]:
    for index, batch in enumerate(shard.batches):
        if row < batch.rows:
            return set(read_unchecked(dataset, shard, index, seq_len, row, row + 1).seg_doc_I.tolist())
        row -= batch.rows
    raise IndexError(row)


def _require_sound(dataset: Path, shards: list[ShardInfo], on_bytes: Callable[[int], None]) -> None:
    """Hash these shards: of a damaged one the texts must not be blamed."""
    done = 0

    def more(size: int) -> None:
        nonlocal done
        done += size
        on_bytes(done)

    for shard in shards:
        problem = shard_problem(dataset / shard.file, shard, more)
        if problem:
            raise DataError(
                f"{dataset / shard.file} {problem}. Mend it with `rxt-dist data verify {dataset} --repair`, then trace "
                f"its documents."
            )


def _stored(dataset: Path, seq_len: int, sample: _Sample) -> dict[int, npt.NDArray[np.uint16]]:
    """The tokens of each document of a sample, as the shards hold them."""
    row_I, start_I, length_I, document_I, offset_I = pieces_of(dataset, sample.shards, seq_len)
    result = {}
    for number in sample.documents:
        here = np.flatnonzero(document_I == number)
        here = here[np.argsort(offset_I[here])]
        result[number] = gather(dataset, sample.shards, seq_len, row_I[here], start_I[here], length_I[here])
    return result
