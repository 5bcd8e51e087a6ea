"""Our shards as Megatron's `.bin/.idx`: one pair a source and split, one sequence a document."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.megatron.corpus import library, pair_of
from data_prep.megatron.description import Description, description_file, description_of
from data_prep.shards.rows import scan, starts_of, unit_name
from rxt_dist.data.manifest import SPLITS, DatasetManifest, ShardInfo, load_manifest
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import blake3_file, fsync_dir, require_file_place, require_free_space, temporary_path

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ExportedCorpus:
    """One pair of files: `prefix` without .bin and .idx."""

    prefix: Path
    source: str
    split: str
    documents: int
    tokens: int


def export_megatron(root: Path, prefix: Path, progress: Progress = lambda done, total: None) -> list[ExportedCorpus]:
    """Write every source and split of a dataset as `PREFIX-SOURCE-SPLIT.bin` and `.idx`, ids as uint16, and beside each
    pair a `.rxt.json` that says what it is.

    Documents are put together again from their pieces, in the order of units and of ordinals in them, and keep their
    [BOS] and [EOS]. Memory: the rows of one unit.

    Args:
        progress: told bytes of shards done and in all.

    Raises:
        DataError: no dataset, a damaged shard, or files of that name exist already.
        ConfigError: `prefix` is a folder, or cannot be written to.
        DiskError: too little space.
    """
    if os.path.isdir(prefix):
        raise ConfigError(f"--out is '{prefix}', which names a folder. Add a beginning of file names: {prefix}/corpus.")
    require_file_place(prefix)
    manifest = load_manifest(root)
    wanted = [
        (source, split, prefix.with_name(f"{prefix.name}-{source.name}-{split}"))
        for source in manifest.sources
        for split in SPLITS
        if source.split(split).shards
    ]
    for _, _, target in wanted:
        require_file_place(target.with_name(target.name + ".bin"))
    existing = [path for _, _, of in wanted for path in _files(of) if path.exists()]
    if existing:
        raise DataError(f"{existing[0]} exists already. Delete it, or choose another --out.")
    require_free_space(prefix.parent, manifest.totals.tokens * 2, "The export")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    total, done = sum(shard.bytes for shard in manifest.shards()), 0
    exported = []
    for source, split, target in wanted:
        about = Description(source.name, source.language, split, manifest.tokenizer_sha256, manifest.root_digest)
        with _PairWriter(target, about) as writer:
            for _, group in groupby(source.split(split).shards, key=unit_name):
                shards = tuple(group)
                for document in _documents(root, manifest, shards):
                    writer.add(document)
                done += sum(shard.bytes for shard in shards)
                progress(done, total)
            writer.finish()
        exported.append(ExportedCorpus(target, source.name, split, writer.documents, writer.tokens))
    return exported


class _PairWriter:
    """Writes one pair and its description; they appear under their names only whole, the index last. What is not
    finished is removed."""

    def __init__(self, target: Path, about: Description) -> None:
        self._pairs = [(temporary_path(path), path) for path in _files(target)]
        self._about = about
        self._builder = library().IndexedDatasetBuilder(str(self._pairs[0][0]), dtype=np.uint16)
        self.documents = self.tokens = 0

    def __enter__(self) -> _PairWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._builder.data_file.close()
        for temporary, _final in self._pairs:
            temporary.unlink(missing_ok=True)

    def add(self, ids: npt.NDArray[np.uint16]) -> None:
        self._builder.add_document(ids, [len(ids)])
        self.documents += 1
        self.tokens += len(ids)

    def finish(self) -> None:
        (data, _), (description, _), (index, _) = self._pairs
        self._builder.finalize(str(index))
        description.write_bytes(description_of(self._about, data, index))
        for temporary, final in self._pairs:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)
        fsync_dir(self._pairs[0][1].parent)


def _files(target: Path) -> tuple[Path, Path, Path]:
    data, index = pair_of(target)
    return data, description_file(target), index


def _documents(
    root: Path, manifest: DatasetManifest, shards: tuple[ShardInfo, ...]
) -> Iterator[npt.NDArray[np.uint16]]:
    """The documents of one unit's shards, whole, by ordinal."""
    for shard in shards:
        path = root / shard.file
        if not path.is_file() or blake3_file(path) != shard.blake3:
            raise DataError(f"Shard {path} is missing or damaged. `rxt-dist data verify` says what can mend it.")
    parts = list(scan(root, shards, manifest.seq_len))
    flat = np.concatenate([part.tokens_RT.reshape(-1) for part in parts])
    sizes = np.cumsum([0] + [part.tokens_RT.size for part in parts])
    starts = np.concatenate([starts_of(part) + base for part, base in zip(parts, sizes[:-1], strict=True)])
    lengths = np.concatenate([part.seg_len_I for part in parts]).astype(np.int64)
    documents = np.concatenate([part.seg_doc_I for part in parts])
    offsets = np.concatenate([part.seg_off_I for part in parts]).astype(np.int64)
    order = np.lexsort((offsets, documents))
    starts, lengths, documents, offsets = (values[order] for values in (starts, lengths, documents, offsets))
    is_first = np.concatenate(([True], documents[1:] != documents[:-1]))
    expected = np.where(is_first, 0, np.concatenate(([0], (offsets + lengths)[:-1])))
    if not np.array_equal(offsets, expected):
        raise DataError(f"The shards of {shards[0].file} lack a piece of a document. Build the dataset again.")
    firsts = np.flatnonzero(is_first).tolist()
    for first, last in zip(firsts, [*firsts[1:], len(starts)], strict=True):
        pieces = [flat[starts[piece] : starts[piece] + lengths[piece]] for piece in range(first, last)]
        document = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        if document[0] != BOS_ID or document[-1] != EOS_ID:
            raise DataError(f"The shards of {shards[0].file} lack the end of a document. Build the dataset again.")
        yield document
