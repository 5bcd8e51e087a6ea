"""Builds one unit of documents: texts -> (cleaned) -> ids -> packed rows -> shards.

What a unit gives is a function of its documents, the tokenizer and the settings; who builds it, how often and with
which backend is not seen in its shards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from data_prep.building.builder import UnitWork
from data_prep.building.encode import open_backend
from data_prep.building.rowstream import HeldOut, Ids, RowStream
from data_prep.building.workers import Report
from data_prep.corpora import ReadCounts, read_unit
from data_prep.documents.inputs import keep_record, require_planned, require_unchanged
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig
from rxt_dist.data.manifest import SPLITS, TOKENIZER_FILE, SourceInfo, Totals
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.data.writer import ShardWriter

if TYPE_CHECKING:
    from data_prep.cleaning.clean import Cleaner

_GROUP_CHARACTERS = 1 << 20  # texts that are encoded together
_HASH_CHARACTERS = 1 << 20

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
class DocumentWork(UnitWork):
    """Builds units of documents. `clean` None leaves them as they are; `threads` lets the tokenizer use all cores."""

    eval_fraction: float
    backend: str
    clean: CleanConfig | None = None
    threads: bool = False

    def builder(self) -> UnitBuilder:
        """Load the tokenizer."""
        return UnitBuilder(self)


class UnitBuilder:
    """Builds units; one in each process."""

    def __init__(self, work: DocumentWork) -> None:
        self._of = work
        self._backend = open_backend(work.backend, work.out / TOKENIZER_FILE, work.threads)

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Write the unit's shards; what its manifest says. `report` is told (bytes of text passed, tokens made) so far.

        Raises:
            DataError: an input cannot be read, is not the one that was planned, or was changed meanwhile.
        """
        before = require_planned(unit)
        cleaner = _cleaner(self._of.clean)
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
        content: dict[str, Any] = {
            "unit": unit.name,
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
        keep_record(self._of.out, unit, before)
        return content

    def _items(
        self, unit: Unit, counts: ReadCounts, cleaner: Cleaner | None, digest: blake3
    ) -> Iterator[tuple[_Item, str]]:
        """The documents that are kept, and their texts. `digest` takes in the hash of every document read, in order."""
        dropped = _dropped(self._of, unit)
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
        out, spec = self._of.out, self._of.spec
        streams = {
            split: RowStream(ShardWriter(out, f"{first.source}/{split}", unit.name, spec), spec.seq_len)
            for split in SPLITS
        }
        return _SourceBuilder(first.language, streams, self._of.eval_fraction)


def _cleaner(config: CleanConfig | None) -> Cleaner | None:
    if config is None:
        return None
    from data_prep.cleaning.clean import Cleaner

    return Cleaner(config)


def _dropped(work: DocumentWork, unit: Unit) -> dict[int, str]:
    """Ordinals of the duplicates in a unit, with the reason."""
    if work.clean is None:
        return {}
    from data_prep.cleaning.deduplicate import dropped_documents

    return dropped_documents(work.out, unit, work.clean)


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
