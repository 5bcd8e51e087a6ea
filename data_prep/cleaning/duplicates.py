"""Duplicates of a whole corpus, found with bounded memory: of equal or similar documents the first one is kept.

    survey_unit (any number of processes and jobs)  ->  decide (one process)  ->  dropped (while a unit is built)

First means: in the order of the units, then of the documents in a unit. So the result does not depend on how many
processes or jobs made the surveys, nor on their order.

Exact duplicates have the same 128-bit hash of their normalised text. Of the rest, two documents are alike if their
MinHash signatures agree in at least `threshold` of their values. Near-duplicates are found in two steps:

1. Clusters: documents that share a band of their signatures and are alike, and what is alike to these in turn. Within a
   band documents are compared with the leaders of their group (the first, then the first that is unlike it, 16 at
   most), so that a boilerplate text that occurs a million times costs a million comparisons, not their square.
2. Within a cluster, in the order of the corpus: a document is dropped if it is like one that is kept, else it is kept
   itself. So of a chain, where A is like B and B like C but C unlike A, both A and C stay. A cluster costs 67,108,864
   comparisons at most, or 16 a document; what is not settled by then is kept.

Hashes, band keys and clusters are read in partitions of about 8,388,608 documents by the value of the key. `decide`
takes 5 MB a million documents and 0.3 GB for the largest partition (a cluster is never parted: 30 bytes a document);
signatures are read through the page cache.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.clean import EXACT_DUPLICATE, NEAR_DUPLICATE
from data_prep.cleaning.survey import FOLDER, Survey, bands_and_rows, require_library, require_surveys, survey_unit
from data_prep.corpora import ReadCounts, read_unit
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig
from rxt_dist.data.manifest import digest_json
from rxt_dist.errors import DataError
from rxt_dist.files import write_atomic, write_json_atomic

__all__ = ["decide", "dropped", "require_library", "survey_unit"]

REPORT_FILE = "report.json"

_PARTITION_DOCUMENTS = 1 << 23
_COMPARE_AT_ONCE = 1 << 16
_LEADERS = 16
_CLUSTER_COMPARISONS = 1 << 26
_SAMPLES, _SAMPLE_UNITS, _SAMPLE_CHARACTERS = 5, 4, 200
_REASONS = (EXACT_DUPLICATE, NEAR_DUPLICATE)
_KEEP, _EXACT, _NEAR = 0, 1, 2

Ids = npt.NDArray[np.uint32]
Progress = Callable[[int, int], None]


def dropped(out: Path, unit: Unit) -> dict[int, str]:
    """The documents of a unit that are duplicates of earlier ones: ordinal -> "exact_duplicate" or "near_duplicate".

    Raises:
        DataError: `decide` has not finished in this folder.
    """
    path = _dropped_path(out, unit)
    try:
        rows = np.load(path)
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing: the duplicates of unit {unit.name} have not been decided. Run the same `rxt-dist data "
            f"build` again."
        ) from error
    except ValueError as error:
        raise DataError(
            f"{path} is damaged ({error}). Delete it and run the same `rxt-dist data build` again."
        ) from error
    return {ordinal: _REASONS[reason - 1] for ordinal, reason in rows.tolist()}


def _dropped_path(out: Path, unit: Unit) -> Path:
    return out / FOLDER / f"{unit.name}.dropped.npy"


def decide(
    out: Path, units: list[Unit], config: CleanConfig, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """Find the duplicates among all surveyed documents; write what each unit drops, and `duplicates/report.json`.

    Does nothing but return the report where that is finished already. Only one process may be at it in a folder.

    Args:
        progress: told steps done and in all: one for the exact duplicates, one for each band, one for the clusters.

    Returns:
        The report: documents, duplicates by reason and source, `clusters` (documents that are kept and of which others
        were dropped), the size of the largest of these groups, and samples of pairs with the beginnings of their texts.

    Raises:
        DataError: a survey is missing.
    """
    surveys = require_surveys(out, units, config)
    spec = digest_json([survey.spec for survey in surveys])
    report_path = out / FOLDER / REPORT_FILE
    finished = _finished_report(report_path, spec)
    if finished is not None and all(_dropped_path(out, unit).is_file() for unit in units):
        return finished
    corpus = _Corpus(surveys)
    bands = bands_and_rows(config.near_duplicates)[0] if config.near_duplicates else 0
    steps = 1 + bands + bool(bands)
    if config.exact_duplicates:
        _find_exact(corpus)
    progress(1, steps)
    if config.near_duplicates is not None:
        for band in range(bands):
            _find_clusters(corpus, band, config.near_duplicates.threshold)
            progress(2 + band, steps)
        for ids, heads in _clusters(corpus):
            _settle(corpus, ids, heads, config.near_duplicates.threshold)
        progress(steps, steps)
    for index, unit in enumerate(units):
        _write_dropped(_dropped_path(out, unit), corpus, index)
    report = {"spec": spec} | _report(corpus, units)
    write_json_atomic(report_path, report)
    return report


def _finished_report(path: Path, spec: str) -> dict[str, Any] | None:
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if report.get("spec") == spec else None


# ---------------------------------------------------------------------------------------------------------------------
# The corpus as numbers
# ---------------------------------------------------------------------------------------------------------------------


class _Corpus:
    """All surveyed documents, numbered in their order, and the forest of what is a duplicate of what.

    `parent` [N] points to an earlier document of the same cluster, or to itself: while clusters are sought to any, in
    the end to the one that is kept instead. `reason` [N] is 0 for what is kept.
    """

    def __init__(self, surveys: list[Survey]) -> None:
        self.surveys = surveys
        self.first = np.concatenate([[0], np.cumsum([survey.documents for survey in surveys])]).astype(np.int64)
        if self.documents >= 1 << 32:
            raise DataError(f"{self.documents} documents are more than de-duplication can number (4,294,967,295).")
        self.parent: Ids = np.arange(self.documents, dtype=np.uint32)
        self.reason = np.zeros(self.documents, dtype=np.uint8)
        self._signatures = lru_cache(maxsize=64)(lambda unit: surveys[unit].signatures())

    @property
    def documents(self) -> int:
        return int(self.first[-1])

    def unit_of(self, ids: Ids) -> npt.NDArray[np.int64]:
        """The number of each document's unit."""
        return np.searchsorted(self.first, ids, side="right") - 1

    def roots(self, ids: Ids) -> Ids:
        """The first document of each one's cluster; shortens the way for the next time."""
        roots = self.parent[ids]
        while True:
            above = self.parent[roots]
            if (above == roots).all():
                break
            roots = above
        self.parent[ids] = roots
        return roots

    def unite(self, ids: Ids, others: Ids) -> None:
        """Make each pair one cluster, headed by its earliest document."""
        while True:
            one, two = self.roots(ids), self.roots(others)
            apart = one != two
            if not apart.any():
                return
            earlier, later = np.minimum(one, two)[apart], np.maximum(one, two)[apart]
            np.minimum.at(self.parent, later, earlier)

    def similarity(self, ids: Ids, others: Ids) -> npt.NDArray[np.float64]:
        """Share of equal signature values of each pair."""
        parts = [np.empty(0)]
        for start in range(0, len(ids), _COMPARE_AT_ONCE):
            part = slice(start, start + _COMPARE_AT_ONCE)
            parts.append((self._gather(ids[part]) == self._gather(others[part])).mean(axis=1))
        return np.concatenate(parts)

    def _gather(self, ids: Ids) -> npt.NDArray[np.uint16]:
        units = self.unit_of(ids)
        rows = ids - self.first[units]
        gathered = np.empty((len(ids), self._signatures(int(units[0])).shape[1]), dtype=np.uint16)
        for unit in np.unique(units).tolist():
            mine = units == unit
            gathered[mine] = self._signatures(unit)[rows[mine]]
        return gathered


def _partitions(
    corpus: _Corpus, read: Callable[[Survey], npt.NDArray[np.uint64]]
) -> Iterator[tuple[npt.NDArray[np.uint64], Ids]]:
    """Keys and numbers of all documents but exact duplicates, sorted by key and then by number, a range of keys at a
    time; of them only those whose key is there twice."""
    parts = -(-corpus.documents // _PARTITION_DOCUMENTS)
    for part in range(parts):
        keys, ids = [], []
        for index, survey in enumerate(corpus.surveys):
            first = int(corpus.first[index])
            of_unit = read(survey)
            wanted = corpus.reason[first : first + len(of_unit)] == _KEEP
            if parts > 1:
                wanted &= of_unit % np.uint64(parts) == part
            keys.append(of_unit[wanted])
            ids.append((np.flatnonzero(wanted) + first).astype(np.uint32))
        key, number = np.concatenate(keys), np.concatenate(ids)
        del keys, ids
        order = np.argsort(key, kind="stable")
        key, number = key[order], number[order]
        same = key[1:] == key[:-1]
        again = np.zeros(len(key), dtype=bool)
        again[1:] |= same
        again[:-1] |= same
        yield key[again], number[again]


# ---------------------------------------------------------------------------------------------------------------------
# Exact and near
# ---------------------------------------------------------------------------------------------------------------------


def _find_exact(corpus: _Corpus) -> None:
    """Partitions by the first half of the hash; the second half decides among those that share it."""
    for key, ids in _partitions(corpus, lambda survey: survey.read("text")[:, 0]):
        second = np.empty(len(ids), dtype=np.uint64)
        units = corpus.unit_of(ids)
        for unit in np.unique(units).tolist():
            mine = units == unit
            second[mine] = corpus.surveys[unit].read("text")[ids[mine] - corpus.first[unit], 1]
        order = np.lexsort((ids, second, key))
        key, second, ids = key[order], second[order], ids[order]
        new = np.ones(len(ids), dtype=bool)
        new[1:] = (key[1:] != key[:-1]) | (second[1:] != second[:-1])
        leaders = ids[new][np.cumsum(new) - 1]
        corpus.parent[ids] = leaders
        corpus.reason[ids[~new]] = _EXACT


def _find_clusters(corpus: _Corpus, band: int, threshold: float) -> None:
    for key, ids in _partitions(corpus, lambda survey: survey.read_band(band)):
        for _ in range(_LEADERS):
            if not len(ids):
                break
            new = np.ones(len(ids), dtype=bool)
            new[1:] = key[1:] != key[:-1]
            leaders = ids[new][np.cumsum(new) - 1]
            key, ids, leaders = key[~new], ids[~new], leaders[~new]
            alike = corpus.roots(ids) == corpus.roots(leaders)
            unknown = np.flatnonzero(~alike)
            alike[unknown] = corpus.similarity(ids[unknown], leaders[unknown]) >= threshold
            corpus.unite(ids[alike], leaders[alike])
            key, ids = key[~alike], ids[~alike]


def _clusters(corpus: _Corpus) -> Iterator[tuple[Ids, Ids]]:
    """Members of whole clusters but their first documents, and these; sorted by the first and then by number."""
    blocks = [slice(start, start + _PARTITION_DOCUMENTS) for start in range(0, corpus.documents, _PARTITION_DOCUMENTS)]

    def members(block: slice) -> Ids:
        own = np.arange(block.start, min(block.stop, corpus.documents), dtype=np.uint32)
        return own[(corpus.parent[block] != own) & (corpus.reason[block] == _KEEP)]

    parts = -(-sum(len(members(block)) for block in blocks) // _PARTITION_DOCUMENTS)
    for part in range(parts):
        found = []
        for block in blocks:
            ids = members(block)
            found.append(ids[corpus.roots(ids) % np.uint32(parts) == part])
        ids = np.concatenate(found)
        heads = corpus.roots(ids)
        order = np.argsort(heads, kind="stable")
        yield ids[order], heads[order]


def _settle(corpus: _Corpus, ids: Ids, heads: Ids, threshold: float) -> None:
    """Drop the members of clusters that are like a kept one. Each round compares all that are left of a cluster with
    its first that is left, which is like none before it and so is kept."""
    new = np.ones(len(ids), dtype=bool)
    new[1:] = heads[1:] != heads[:-1]
    sizes = np.diff(np.append(np.flatnonzero(new), len(ids)))
    rounds = np.repeat(np.maximum(_LEADERS, _CLUSTER_COMPARISONS // np.maximum(sizes, 1)), sizes)
    corpus.parent[ids] = ids
    leaders, done = heads, 0
    while True:
        alike = corpus.similarity(ids, leaders) >= threshold
        corpus.parent[ids[alike]] = leaders[alike]
        corpus.reason[ids[alike]] = _NEAR
        done += 1
        left = ~alike & (rounds > done)
        ids, heads, rounds = ids[left], heads[left], rounds[left]
        if not len(ids):
            return
        new = np.ones(len(ids), dtype=bool)
        new[1:] = heads[1:] != heads[:-1]
        leaders = ids[new][np.cumsum(new) - 1][~new]
        ids, heads, rounds = ids[~new], heads[~new], rounds[~new]


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def _write_dropped(path: Path, corpus: _Corpus, index: int) -> None:
    """uint32 [n, 2]: ordinal and reason (1 exact, 2 near) of each dropped document of a unit."""
    reasons = corpus.reason[int(corpus.first[index]) : int(corpus.first[index + 1])]
    rows = np.flatnonzero(reasons)
    ordinals = corpus.surveys[index].read("ordinal")[rows]
    buffer = io.BytesIO()
    np.save(buffer, np.stack([ordinals, reasons[rows]], axis=1).astype(np.uint32))
    write_atomic(path, buffer.getvalue())


def _report(corpus: _Corpus, units: list[Unit]) -> dict[str, Any]:
    sources: dict[str, dict[str, int]] = {}
    for index, survey in enumerate(corpus.surveys):
        reasons = corpus.reason[int(corpus.first[index]) : int(corpus.first[index + 1])]
        of_row = survey.read("source")
        for number, name in enumerate(survey.sources):
            counts = np.bincount(reasons[of_row == number], minlength=3)
            entry = sources.setdefault(name, {"documents": 0, EXACT_DUPLICATE: 0, NEAR_DUPLICATE: 0})
            entry["documents"] += int(counts.sum())
            entry[EXACT_DUPLICATE] += int(counts[_EXACT])
            entry[NEAR_DUPLICATE] += int(counts[_NEAR])
    duplicates = np.flatnonzero(corpus.reason).astype(np.uint32)
    _, sizes = np.unique(corpus.roots(duplicates), return_counts=True)
    return {
        "documents": corpus.documents,
        EXACT_DUPLICATE: int((corpus.reason == _EXACT).sum()),
        NEAR_DUPLICATE: int((corpus.reason == _NEAR).sum()),
        "clusters": len(sizes),
        "largest_cluster": int(sizes.max(initial=0)) + bool(len(sizes)),
        "sources": {name: sources[name] for name in sorted(sources)},
        "samples": _samples(corpus, units),
    }


def _samples(corpus: _Corpus, units: list[Unit]) -> list[dict[str, Any]]:
    """The first few pairs of each reason, with the beginnings of their texts; they are read from at most 4 units."""
    chosen: list[tuple[str, int, int]] = []
    wanted: dict[int, set[int]] = {}
    for code, reason in enumerate(_REASONS, start=1):
        ids = np.flatnonzero(corpus.reason == code)[:1000].astype(np.uint32)
        taken = 0
        for later, earlier in zip(ids.tolist(), corpus.roots(ids).tolist(), strict=True):
            places = [_place(corpus, number) for number in (earlier, later)]
            if taken < _SAMPLES and len(wanted.keys() | {unit for unit, _ in places}) <= _SAMPLE_UNITS:
                taken += 1
                chosen.append((reason, earlier, later))
                for unit, ordinal in places:
                    wanted.setdefault(unit, set()).add(ordinal)
    texts = {(unit, ordinal): text for unit in wanted for ordinal, text in _beginnings(units[unit], wanted[unit])}
    samples = []
    for reason, earlier, later in chosen:
        sample: dict[str, Any] = {"reason": reason}
        if "signature" in corpus.surveys[0].columns:
            pair = (np.array([number], dtype=np.uint32) for number in (earlier, later))
            sample["similarity"] = round(float(corpus.similarity(*pair)[0]), 3)
        for role, number in (("kept", earlier), ("dropped", later)):
            unit, ordinal = _place(corpus, number)
            sample[role] = {"unit": units[unit].name, "ordinal": ordinal} | texts[unit, ordinal]
        samples.append(sample)
    return samples


def _place(corpus: _Corpus, number: int) -> tuple[int, int]:
    """Unit and ordinal of a document."""
    unit = int(corpus.unit_of(np.array([number], dtype=np.uint32))[0])
    return unit, int(corpus.surveys[unit].read("ordinal")[number - corpus.first[unit]])


def _beginnings(unit: Unit, ordinals: set[int]) -> Iterator[tuple[int, dict[str, str]]]:
    last = max(ordinals)
    for ordinal, document in enumerate(read_unit(unit, ReadCounts())):
        if ordinal in ordinals:
            yield ordinal, {"id": document.id, "text": document.text[:_SAMPLE_CHARACTERS]}
        if ordinal == last:
            return
