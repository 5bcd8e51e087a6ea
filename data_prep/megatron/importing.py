"""Megatron's `.bin/.idx` corpora into our shards.

Megatron stores a document as ids and knows nothing of the tokenizer. On import, [BOS] at a document's start and [EOS]
at its end (or the id that `eod` names) are taken off, as the packer puts its own; the rest must be text. That the ids
are those of the given tokenizer is checked on a sample: text decoded from them has to encode to the same ids again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from tokenizers import Tokenizer, pre_tokenizers

from data_prep.building.builder import Built, Job, Sharing, UnitWork, build, rows_manifest
from data_prep.building.folder import Say
from data_prep.building.rowstream import HeldOut, Ids, RowStream, require_fraction
from data_prep.building.workers import Report, Show
from data_prep.megatron.corpus import MegatronCorpus, readable
from data_prep.megatron.description import description_file, read_description
from data_prep.readers.base import Input, Slice
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.units import Unit, fingerprint_file, identity, require_as_seen
from rxt_dist.config.corpus import source_name_problem
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    DatasetManifest,
    SourceInfo,
    tokenizer_fingerprint,
)
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.rows import BOS_ID, EOS_ID, SPECIAL_COUNT, SPECIAL_TOKENS
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError

_UNIT_BYTES = 256 << 20
_WINDOW_BYTES = 8 << 20
_SAMPLE_SEQUENCES, _SAMPLE_TOKENS = 64, 8192


@dataclass(frozen=True)
class ImportRequest(Sharing):
    """What is to be imported: `prefix` without .bin and .idx; `eod` the id at the end of documents, [EOS] if None."""

    prefix: Path
    out: Path
    tokenizer: Path
    seq_len: int
    language: str
    source: str
    eod: int | None = None
    eval_fraction: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction(self.eval_fraction)
        problem = source_name_problem(self.source)
        if problem:
            raise ConfigError(f"--source cannot be used: {problem}.")


@dataclass
class ImportCounts:
    """Documents taken over, documents without text, and control tokens that were taken off."""

    documents: int = 0
    empty: int = 0
    bos: int = 0
    eod: int = 0

    def add(self, other: ImportCounts) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class ImportResult(Built):
    """What an import came to."""

    manifest: DatasetManifest | None = None
    counts: ImportCounts = field(default_factory=ImportCounts)


def import_megatron(
    request: ImportRequest, say: Say = lambda line: None, show: Show = lambda progress: None
) -> ImportResult:
    """Import, or finish importing, a corpus as a dataset of one source.

    A document's ordinal is its number in the unit, a unit 256 MiB of the .bin. Documents are held out by a hash of
    their ids (HeldOut), so equal ones are on one side, but for those of small units: the one that a unit without any
    other holds out may stand in another unit too.

    Args:
        say: told in a sentence what is being done.
        show: told how far it is, in bytes of the .bin.

    Raises:
        DataError: unusable files, ids that the tokenizer does not have or that are control tokens inside a document,
            another tokenizer, nothing to import, or a folder that belongs to something else.
        ConfigError: a row length or fraction that cannot be, or an `out` that cannot be written to.
        DiskError: too little space.
    """
    return build(ImportJob(request, say, show))


class ImportJob(Job[ImportResult]):
    """Documents of a Megatron corpus to rows."""

    doing, purpose = "Importing", "Importing the corpus"
    result = ImportResult

    def __init__(self, request: ImportRequest, say: Say, show: Show) -> None:
        super().__init__(request.out, request.seq_len, request, say, show)
        self._request = request
        tokenizer, sha256 = load_tokenizer(request.tokenizer), tokenizer_fingerprint(self.tokenizer_json())
        self._corpus = MegatronCorpus(request.prefix)
        # Before anything is read of them: workers open them by name, and would read on in others that took their place.
        looked_at = [(path, _identity(path)) for path in (self._corpus.bin, self._corpus.idx)]
        about = read_description(request.prefix)
        if about is not None and about.tokenizer_sha256 != sha256:
            raise DataError(
                f"{description_file(request.prefix)} says that tokenizer {about.tokenizer_sha256[:16]}... made the "
                f"ids, but {request.tokenizer} is {sha256[:16]}...: every id would mean something else. Give the "
                f"tokenizer.json of the dataset that was exported."
            )
        _check_tokenizer(self._corpus, tokenizer, request)
        self._pair = tuple(_input(path, seen) for path, seen in looked_at)
        self._files = tuple(InputFile(item.name, item.bytes, fingerprint=item.fingerprint) for item in self._pair)

    def plan(self) -> Sequence[Unit]:
        """Consecutive documents of some 256 MiB; a slice counts documents."""
        corpus = self._corpus
        return [
            Unit(f"u{number:05d}", (Slice(self._pair[0], start, stop, size),), size)
            for number, (start, stop) in enumerate(corpus.ranges(_UNIT_BYTES))
            for size in [corpus.byte_of(stop) - corpus.byte_of(start)]
        ]

    def settings(self) -> dict[str, Any]:
        request = self._request
        return {
            "format": "megatron-import",
            "format_version": FORMAT_VERSION,
            "packing_version": PACKING_VERSION,
            "seq_len": request.seq_len,
            "language": request.language,
            "source": request.source,
            "eod": request.eod,
            "eval_fraction": request.eval_fraction,
            "unit_bytes": _UNIT_BYTES,
            "inputs": [item.in_spec() for item in self._files],
        }

    def tokenizer_json(self) -> str:
        return self._request.tokenizer.read_text(encoding="utf-8")

    def needed_bytes(self, units: Sequence[Unit], spec: ShardSpec | None) -> int:
        return sum(unit.text_bytes for unit in units) * 2 // self._corpus.item_bytes + (1 << 20)

    def work(self, spec: ShardSpec, units: Sequence[Unit], threads: bool) -> ImportWork:
        return ImportWork(self.out, spec, self._request, self._pair)

    def merge(self, spec: ShardSpec, contents: Sequence[Mapping[str, Any]]) -> ImportResult:
        counts = ImportCounts()
        source = SourceInfo(self._request.source, self._request.language)
        for content in contents:
            counts.add(ImportCounts(**content["counts"]))
            for value in content["sources"]:
                source += SourceInfo.from_dict(value)
        if not counts.documents:
            raise DataError(f"{self._request.prefix} holds no document with text ({counts.empty} are empty).")
        return ImportResult(manifest=rows_manifest(spec, self._files, (source,)), counts=counts)


def _identity(path: Path) -> tuple[int, ...]:
    with readable(path):
        return identity(path.stat())


def _input(path: Path, seen: tuple[int, ...]) -> Input:
    with readable(path):
        return Input(path.name, str(path), 0, path.stat().st_size, fingerprint_file(path), seen=seen)


# ---------------------------------------------------------------------------------------------------------------------
# One unit
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImportWork(UnitWork):
    """Imports units of documents from a `pair` of .bin and .idx."""

    request: ImportRequest
    pair: tuple[Input, ...]

    def builder(self) -> _UnitImporter:
        """Open the corpus."""
        return _UnitImporter(self)


class _UnitImporter:
    """Imports units; one in each process."""

    def __init__(self, work: ImportWork) -> None:
        self._out, self._request, self._spec, self._pair = work.out, work.request, work.spec, work.pair
        self._corpus = MegatronCorpus(work.request.prefix)
        self._eod = EOS_ID if work.request.eod is None else work.request.eod
        self._bytes_of = _bytes_of_ids(load_tokenizer(work.out / TOKENIZER_FILE))

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Write the shards of a unit's documents; what its manifest says. `report` is told bytes and tokens so far."""
        (part,) = unit.slices
        counts, tokens = ImportCounts(), 0
        streams = {
            split: RowStream(
                ShardWriter(self._out, f"{self._request.source}/{split}", unit.name, self._spec), self._spec.seq_len
            )
            for split in SPLITS
        }
        held_out: HeldOut[Ids] = HeldOut(self._request.eval_fraction)
        for first, last in self._corpus.ranges(_WINDOW_BYTES, part.start, part.stop):
            for number, ids in self._texts(first, last, counts):
                tokens += len(ids) + 2
                rank = int.from_bytes(blake3(ids.tobytes()).digest()[:8], "little")
                for split, item in held_out.add(rank, Ids(number - part.start, ids, int(self._bytes_of[ids].sum()))):
                    streams[split].add(item)
            report(self._corpus.byte_of(last) - self._corpus.byte_of(part.start), tokens)
        for split, item in held_out.finish():
            streams[split].add(item)
        for file in self._pair:
            require_as_seen(file)
        splits = {split: stream.finish() for split, stream in streams.items()}
        source = SourceInfo(self._request.source, self._request.language, splits["train"], splits["eval"])
        sources = [asdict(source)] if counts.documents else []
        return {"documents": [part.start, part.stop], "counts": asdict(counts), "sources": sources}

    def _texts(self, first: int, last: int, counts: ImportCounts) -> Iterator[tuple[int, npt.NDArray[np.uint16]]]:
        """(number, text ids) of the documents [first, last) that hold text."""
        ids, lengths = self._corpus.read(first, last)
        self._check_vocabulary(ids, lengths, first)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        filled = np.flatnonzero(lengths)
        has_bos, has_eod = np.zeros(len(lengths), dtype=np.int64), np.zeros(len(lengths), dtype=np.int64)
        has_bos[filled] = ids[starts[filled]] == BOS_ID
        long_enough = filled[lengths[filled] > has_bos[filled]]
        has_eod[long_enough] = ids[ends[long_enough] - 1] == self._eod
        starts, ends = starts + has_bos, ends - has_eod
        special = np.flatnonzero(ids < SPECIAL_COUNT)
        owner = np.searchsorted(ends, special, side="right")
        inside = special[(special >= starts[np.minimum(owner, len(starts) - 1)]) & (owner < len(starts))]
        if len(inside):
            self._refuse_special(ids, int(inside[0]), lengths, first)
        narrow = ids.astype(np.uint16)
        for index, (begin, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            counts.bos += int(has_bos[index])
            counts.eod += int(has_eod[index])
            if end <= begin:
                counts.empty += 1
                continue
            counts.documents += 1
            yield first + index, narrow[begin:end]

    def _check_vocabulary(self, ids: npt.NDArray[np.integer], lengths: npt.NDArray[np.int64], first: int) -> None:
        size = self._spec.vocab_size
        if len(ids) and (int(ids.max()) >= size or int(ids.min()) < 0):
            at = int(np.flatnonzero((ids >= size) | (ids < 0))[0])
            document = first + int(np.searchsorted(np.cumsum(lengths), at, side="right"))
            raise DataError(
                f"{self._corpus.bin}: document {document} holds id {ids[at]}, but {self._request.tokenizer} has {size} "
                f"ids. Give the tokenizer that made the corpus."
            )

    def _refuse_special(
        self, ids: npt.NDArray[np.integer], at: int, lengths: npt.NDArray[np.int64], first: int
    ) -> None:
        index = int(np.searchsorted(np.cumsum(lengths), at, side="right"))
        name = next(token for token, number in SPECIAL_TOKENS.items() if number == ids[at])
        place = at - int(lengths[:index].sum())
        raise DataError(
            f"{self._corpus.bin}: document {first + index} holds the control token {name} (id {ids[at]}) at its "
            f"position {place}, inside the text. Only [BOS] may begin a document and [EOS] (or the id that "
            f"--eod names) end it; split such documents, or tokenise their text with `rxt-dist data build`."
        )


def _bytes_of_ids(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes of text that each id stands for, int64 [V]."""
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    sizes = []
    for number in range(tokenizer.get_vocab_size()):
        token = tokenizer.id_to_token(number) or ""
        sizes.append(len(token) if alphabet.issuperset(token) else len(tokenizer.decode([number]).encode()))
    return np.array(sizes, dtype=np.int64)


def _check_tokenizer(corpus: MegatronCorpus, tokenizer: Tokenizer, request: ImportRequest) -> None:
    """Refuse a tokenizer that does not make the corpus's ids out of its text, judged by up to 64 sequences."""
    eod, size = EOS_ID if request.eod is None else request.eod, tokenizer.get_vocab_size()
    tried = equal = 0
    for number in np.unique(np.linspace(0, corpus.sequences - 1, _SAMPLE_SEQUENCES).astype(np.int64)).tolist():
        ids = corpus.sequence(number).tolist()
        ids = ids[1:] if ids[:1] == [BOS_ID] else ids
        ids = ids[:-1] if ids[-1:] == [eod] else ids
        if ids and len(ids) <= _SAMPLE_TOKENS and min(ids) >= SPECIAL_COUNT and max(ids) < size:
            tried += 1
            equal += tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids == ids
    if equal * 2 < tried:
        raise DataError(
            f"{request.tokenizer} is not the tokenizer that made {corpus.bin}: of {tried} sequences that were decoded "
            f"and encoded again, only {equal} came back as the same ids. Give the tokenizer that made the corpus, and "
            f"with --eod the id that ends its documents."
        )
