"""Megatron's `.bin/.idx` corpora into our shards.

Megatron stores a document as ids and knows nothing of the tokenizer. On import, [BOS] at a document's start and [EOS]
at its end (or the id that `eod` names) are taken off, as the packer puts its own; the rest must be text. That the ids
are those of the given tokenizer is checked on a sample: text decoded from them has to encode to the same ids again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from tokenizers import Tokenizer, pre_tokenizers

from data_prep.building.folder import UnitFolder, opened
from data_prep.building.rowstream import HeldOut, Ids, RowStream
from data_prep.megatron.corpus import MegatronCorpus
from data_prep.megatron.description import description_file, read_description
from data_prep.tokenizing.tokenizer import load_tokenizer
from data_prep.units import fingerprint_file
from rxt_dist.config.corpus import source_name_problem
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.manifest import FORMAT_VERSION, SPLITS, DatasetManifest, SourceInfo, tokenizer_fingerprint
from rxt_dist.data.packing import PACKING_VERSION
from rxt_dist.data.rows import BOS_ID, EOS_ID, SPECIAL_COUNT, SPECIAL_TOKENS
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import require_folder, require_free_space

_UNIT_BYTES = 256 << 20
_WINDOW_BYTES = 8 << 20
_SAMPLE_SEQUENCES, _SAMPLE_TOKENS = 64, 8192

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ImportRequest:
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
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction is {self.eval_fraction}; it must be at least 0 and below 1.")
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
class ImportResult:
    """A finished import; `units_kept` were finished by an earlier run."""

    manifest: DatasetManifest
    counts: ImportCounts
    units: int
    units_kept: int


def import_megatron(request: ImportRequest, progress: Progress = lambda done, total: None) -> ImportResult:
    """Import, or finish importing, a corpus as a dataset of one source.

    A document's ordinal is its number in the unit, a unit 256 MiB of the .bin. Documents are held out by a hash of
    their ids (HeldOut), so equal ones are on one side, but for those of small units: the one that a unit without any
    other holds out may stand in another unit too.

    Args:
        progress: told bytes of the .bin done and in all.

    Raises:
        DataError: unusable files, ids that the tokenizer does not have or that are control tokens inside a document,
            another tokenizer, nothing to import, or a folder that belongs to something else.
        ConfigError: a row length or fraction that cannot be, or an `out` that cannot be written to.
        DiskError: too little space.
    """
    require_folder(request.out)
    tokenizer = load_tokenizer(request.tokenizer)
    text = request.tokenizer.read_text(encoding="utf-8")
    shape = (request.seq_len, tokenizer.get_vocab_size(), tokenizer_fingerprint(text), PACKING_VERSION)
    ShardSpec(*shape, "")
    corpus = MegatronCorpus(request.prefix)
    about = read_description(request.prefix)
    if about is not None and about.tokenizer_sha256 != shape[2]:
        raise DataError(
            f"{description_file(request.prefix)} says that tokenizer {about.tokenizer_sha256[:16]}... made the ids, "
            f"but {request.tokenizer} is {shape[2][:16]}...: every id would mean something else. Give the "
            f"tokenizer.json of the dataset that was exported."
        )
    _check_tokenizer(corpus, tokenizer, request)
    files = [
        InputFile(path.name, path.stat().st_size, fingerprint=fingerprint_file(path))
        for path in (corpus.bin, corpus.idx)
    ]
    spec = {
        "format": "megatron-import",
        "format_version": FORMAT_VERSION,
        "packing_version": PACKING_VERSION,
        "seq_len": request.seq_len,
        "language": request.language,
        "source": request.source,
        "eod": request.eod,
        "eval_fraction": request.eval_fraction,
        "unit_bytes": _UNIT_BYTES,
        "tokenizer_sha256": shape[2],
        "inputs": [item.in_spec() for item in files],
    }
    total = corpus.bin.stat().st_size
    require_free_space(request.out, total * 2 // corpus.item_bytes + (1 << 20), "Importing the corpus")
    with opened(request.out, spec, text) as folder:
        builder = _UnitImporter(folder, corpus, tokenizer, request, ShardSpec(*shape, folder.spec_hash))
        units = {f"u{number:05d}": bounds for number, bounds in enumerate(corpus.ranges(_UNIT_BYTES))}
        pending = [unit for unit in units if folder.finished(unit) is None]
        for unit in pending:
            builder.build(unit, *units[unit], lambda done: progress(done, total))
        return _merge(request, folder, list(units), shape, tuple(files), len(units) - len(pending))


class _UnitImporter:
    """Imports and commits units."""

    def __init__(
        self, folder: UnitFolder, corpus: MegatronCorpus, tokenizer: Tokenizer, request: ImportRequest, spec: ShardSpec
    ) -> None:
        self._folder, self._corpus, self._request, self._spec = folder, corpus, request, spec
        self._eod = EOS_ID if request.eod is None else request.eod
        self._bytes_of = _bytes_of_ids(tokenizer)

    def build(self, unit: str, start: int, stop: int, report: Callable[[int], None]) -> None:
        """Write the shards of documents [start, stop), then the unit's manifest. `report` is told bytes passed."""
        counts = ImportCounts()
        streams = {
            split: RowStream(
                ShardWriter(self._folder.root, f"{self._request.source}/{split}", unit, self._spec), self._spec.seq_len
            )
            for split in SPLITS
        }
        held_out: HeldOut[Ids] = HeldOut(self._request.eval_fraction)
        for first, last in self._corpus.ranges(_WINDOW_BYTES, start, stop):
            for number, ids in self._texts(first, last, counts):
                rank = int.from_bytes(blake3(ids.tobytes()).digest()[:8], "little")
                for split, item in held_out.add(rank, Ids(number - start, ids, int(self._bytes_of[ids].sum()))):
                    streams[split].add(item)
            report(self._corpus.byte_of(last))
        for split, item in held_out.finish():
            streams[split].add(item)
        splits = {split: stream.finish() for split, stream in streams.items()}
        source = SourceInfo(self._request.source, self._request.language, splits["train"], splits["eval"])
        sources = [asdict(source)] if counts.documents else []
        self._folder.commit(unit, {"documents": [start, stop], "counts": asdict(counts), "sources": sources})

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


def _merge(
    request: ImportRequest,
    folder: UnitFolder,
    units: list[str],
    shape: tuple[int, int, str, int],
    files: tuple[InputFile, ...],
    kept: int,
) -> ImportResult:
    counts = ImportCounts()
    source = SourceInfo(request.source, request.language)
    for unit in units:
        content = folder.finished(unit)
        assert content is not None, "a unit vanished while the import held the lock"
        counts.add(ImportCounts(**content["counts"]))
        for value in content["sources"]:
            source += SourceInfo.from_dict(value)
    if not counts.documents:
        raise DataError(f"{request.prefix} holds no document with text ({counts.empty} are empty).")
    seq_len, vocab_size, sha256, packing = shape
    manifest = DatasetManifest(seq_len, vocab_size, sha256, folder.spec_hash, packing, files, (source,))
    return ImportResult(finish_dataset(folder.root, manifest, units), counts, len(units), kept)
