"""Builds one unit: documents -> (cleaned) -> ids -> packed rows -> shards, and then the unit's manifest.

The manifest `units/<unit>.json` is the commit: a shard that no manifest names does not exist. What a unit gives is a
function of its documents, the tokenizer and the settings; who builds it, how often and with which backend is not seen
in its shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from data_prep.building.encode import open_backend
from data_prep.building.inputs import keep_record, require_planned, require_unchanged
from data_prep.building.rowstream import HeldOut, Ids, RowStream
from data_prep.corpora import ReadCounts, read_unit
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig
from rxt_dist.data.manifest import SPLITS, TOKENIZER_FILE, SourceInfo, Totals, sums_file
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.files import write_json_atomic

if TYPE_CHECKING:
    from data_prep.cleaning.clean import Cleaner

UNITS_FOLDER = "units"

_GROUP_CHARACTERS = 1 << 20  # texts that are encoded together
_HASH_CHARACTERS = 1 << 20
_ROW_SUM_BYTES = 8

# All start with one character, which the regular expression engine then looks for at the speed of memchr.
_CONTROL_LITERAL = re.compile(r"\[(?:" + "|".join(re.escape(token[1:]) for token in SPECIAL_TOKENS) + ")")


class _Item(NamedTuple):
    """A document on its way into a row, without its text."""

    ordinal: int
    source: str
    language: str
    text_bytes: int
    literals: int
    held_out_rank: int  # 64 bits of the hash of the document's text


class _SourceBuilder:
    """One source's documents of a unit, each on its way to training or evaluation."""

    def __init__(self, language: str, streams: dict[str, RowStream], eval_fraction: float) -> None:
        self.language = language
        self._streams = streams
        self._held_out: HeldOut[Ids] = HeldOut(eval_fraction)

    def add(self, item: _Item, ids: npt.NDArray[np.uint16]) -> None:
        equal = self._held_out.waiting(item.held_out_rank)
        if equal is not None and np.array_equal(equal.ids, ids):
            ids = equal.ids  # any number of equal documents may wait, in memory once
        self._put(self._held_out.add(item.held_out_rank, Ids(item.ordinal, ids, item.text_bytes, item.literals)))

    def _put(self, routed: list[tuple[str, Ids]]) -> None:
        for split, item in routed:
            self._streams[split].add(item)

    def finish(self, name: str) -> SourceInfo:
        self._put(self._held_out.finish())
        return SourceInfo(name, self.language, self._streams["train"].finish(), self._streams["eval"].finish())


@dataclass(frozen=True)
class UnitJob:
    """What building a unit needs to know, apart from the unit; it travels to worker processes.

    `clean` None leaves the documents as they are; `threads` lets the tokenizer use all cores.
    """

    out: Path
    spec: ShardSpec
    eval_fraction: float
    backend: str
    clean: CleanConfig | None = None
    threads: bool = False

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit is committed."""
        return finished_unit(self.out, unit, self.spec.spec_hash) is not None

    def open(self) -> UnitBuilder:
        """Load the tokenizer."""
        return UnitBuilder(self)


class UnitBuilder:
    """Builds and commits units; one in each process."""

    def __init__(self, job: UnitJob) -> None:
        self._job = job
        self._backend = open_backend(job.backend, job.out / TOKENIZER_FILE, job.threads)

    def __call__(self, unit: Unit, report: Callable[[int, int], None]) -> None:
        """Write the unit's shards, then its manifest. `report` is told (bytes of text passed, tokens made) so far.

        Raises:
            DataError: an input cannot be read, is not the one that was planned, or was changed meanwhile.
        """
        before = require_planned(unit)
        cleaner = _cleaner(self._job.clean)
        sources: dict[str, _SourceBuilder] = {}
        counts, digest = ReadCounts(), blake3()
        text_bytes = tokens = 0
        for items, texts in _groups(self._items(unit, counts, cleaner, digest)):
            encoded = self._backend.encode(texts)
            texts.clear()  # packing needs memory too
            for item, ids in zip(items, encoded, strict=True):
                builder = sources.get(item.source)
                if builder is None:
                    builder = sources[item.source] = self._source(unit, item)
                builder.add(item, ids)
                text_bytes += item.text_bytes
                tokens += len(ids) + 2
            report(text_bytes, tokens)
        finished = [sources[name].finish(name) for name in sorted(sources)]
        totals = sum((source.train.totals + source.eval.totals for source in finished), Totals())
        shards = [shard for source in finished for split in SPLITS for shard in source.split(split).shards]
        content = {
            "unit": unit.name,
            "spec_hash": self._job.spec.spec_hash,
            "backend": self._backend.name,
            "documents_blake3": digest.hexdigest(),
            "counts": asdict(counts),
            "totals": asdict(totals),
            "bytes": sum(shard.bytes for shard in shards),
            "sources": [asdict(source) for source in finished],
        }
        if cleaner is not None:
            content["clean"] = cleaner.report.to_dict()
        require_unchanged(unit, before)
        keep_record(self._job.out, unit, before)
        write_json_atomic(unit_path(self._job.out, unit), content)

    def _items(
        self, unit: Unit, counts: ReadCounts, cleaner: Cleaner | None, digest: blake3
    ) -> Iterator[tuple[_Item, str]]:
        """The documents that are kept, and their texts. `digest` takes in the hash of every document read, in order."""
        dropped = _dropped(self._job, unit)
        for ordinal, document in enumerate(read_unit(unit, counts)):
            kept, (hashed, text_bytes) = document, hash_text(document.text)
            digest.update(hashed)
            if cleaner is not None:
                cleaned = cleaner.clean(document, dropped.get(ordinal))
                if isinstance(cleaned, str):
                    continue
                if cleaned is not document:
                    kept, (hashed, text_bytes) = cleaned, hash_text(cleaned.text)
            literals = sum(1 for _ in _CONTROL_LITERAL.finditer(kept.text)) if "[" in kept.text else 0
            rank = int.from_bytes(hashed[:8], "little")
            yield _Item(ordinal, kept.source, kept.language, text_bytes, literals, rank), kept.text

    def _source(self, unit: Unit, first: _Item) -> _SourceBuilder:
        job = self._job
        streams = {
            split: RowStream(ShardWriter(job.out, f"{first.source}/{split}", unit.name, job.spec), job.spec.seq_len)
            for split in SPLITS
        }
        return _SourceBuilder(first.language, streams, job.eval_fraction)


def _cleaner(config: CleanConfig | None) -> Cleaner | None:
    if config is None:
        return None
    from data_prep.cleaning.clean import Cleaner

    return Cleaner(config)


def _dropped(job: UnitJob, unit: Unit) -> dict[int, str]:
    """Ordinals of the duplicates in a unit, with the reason."""
    if job.clean is None:
        return {}
    from data_prep.cleaning.deduplicate import dropped_documents

    return dropped_documents(job.out, unit, job.clean)


def hash_text(text: str) -> tuple[bytes, int]:
    """blake3 of the UTF-8 text, and its length in bytes; a very long text is never copied whole."""
    if len(text) <= _HASH_CHARACTERS:
        encoded = text.encode()
        return blake3(encoded).digest(), len(encoded)
    digest, size = blake3(), 0
    for start in range(0, len(text), _HASH_CHARACTERS):
        part = text[start : start + _HASH_CHARACTERS].encode()
        digest.update(part)
        size += len(part)
    return digest.digest(), size


def _groups(documents: Iterator[tuple[_Item, str]]) -> Iterator[tuple[list[_Item], list[str]]]:
    """Documents in groups of about a million characters; a very long text is alone."""
    items: list[_Item] = []
    texts: list[str] = []
    size = 0
    for item, text in documents:
        if items and size + len(text) > _GROUP_CHARACTERS:
            yield items, texts
            items, texts, size = [], [], 0
        items.append(item)
        texts.append(text)
        size += len(text)
    if items:
        yield items, texts


# ---------------------------------------------------------------------------------------------------------------------
# What a unit leaves in the folder
# ---------------------------------------------------------------------------------------------------------------------


def unit_path(out: Path, unit: Unit) -> Path:
    """The unit's manifest."""
    return out / UNITS_FOLDER / f"{unit.name}.json"


def finished_unit(out: Path, unit: Unit, spec_hash: str) -> dict[str, Any] | None:
    """The unit's manifest if it is committed and its shards still have their sizes; None means: build it."""
    try:
        content: dict[str, Any] = json.loads(unit_path(out, unit).read_text(encoding="utf-8"))
        shards = [shard for s in content["sources"] for split in SPLITS for shard in s[split]["shards"]]
        sound = all(
            (out / shard["file"]).stat().st_size == shard["bytes"]
            and (out / sums_file(shard["file"])).stat().st_size == shard["rows"] * _ROW_SUM_BYTES
            for shard in shards
        )
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content if sound and content.get("spec_hash") == spec_hash else None


def remove_leftovers(out: Path, unit: Unit) -> None:
    """Delete temporary files of a unit that nobody is building (the caller holds its lock)."""
    for pattern in (f"*/*/.{unit.name}-*.tmp.*", f"*/.{unit.name}.*.tmp.*", f"*/..{unit.name}.*.tmp.*"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)
