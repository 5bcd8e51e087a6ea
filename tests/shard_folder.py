"""A dataset folder of random documents in several units, written through the shard writer: no text is read."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_prep.building.builder import rows_manifest
from data_prep.building.folder import SPEC_FILE, UNITS_FOLDER, commit_unit
from data_prep.corpora import Document
from data_prep.shards.rows import scan, starts_of
from data_prep.tokenizing.tokenizer import train_tokenizer
from rxt_dist.data.manifest import (
    SPLITS,
    TOKENIZER_FILE,
    DatasetManifest,
    SourceInfo,
    SplitInfo,
    Totals,
    digest_json,
    load_manifest,
    tokenizer_fingerprint,
)
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS, pack
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.files import write_atomic, write_json_atomic

# {unit: {source: {split: {ordinal: ids}}}}
Corpus = dict[str, dict[str, dict[str, dict[int, npt.NDArray[np.uint16]]]]]
VOCABULARY = 290


@cache
def tokenizer_json() -> str:
    text = "a word and another word of a small tokenizer, byż może trochę po polsku " * 40
    return train_tokenizer([Document(text, "en", "en", "0")], VOCABULARY).to_str()


def random_corpus(
    seed: int = 0, units: int = 3, sources: tuple[str, ...] = ("en", "pl"), documents: int = 120, longest: int = 90
) -> Corpus:
    """Documents of 1 to `longest` ids; every tenth is held out, so that ordinals have gaps."""
    rng = np.random.default_rng(seed)
    corpus: Corpus = {}
    for unit in range(units):
        corpus[f"u{unit:05d}"] = splits = {name: {split: {} for split in SPLITS} for name in sources}
        for ordinal in range(documents):
            ids = rng.integers(11, VOCABULARY, rng.integers(1, longest)).astype(np.uint16)
            splits[sources[int(rng.integers(len(sources)))]]["eval" if ordinal % 10 == 9 else "train"][ordinal] = ids
    return corpus


def write_folder(root: Path, corpus: Corpus, seq_len: int) -> DatasetManifest:
    sha256 = tokenizer_fingerprint(tokenizer_json())
    content = {"seq_len": seq_len, "tokenizer_sha256": sha256}
    spec = ShardSpec(seq_len, VOCABULARY, sha256, PACKING_VERSION, digest_json(content))
    merged: dict[str, SourceInfo] = {}
    (root / UNITS_FOLDER).mkdir(parents=True)
    write_atomic(root / TOKENIZER_FILE, tokenizer_json())
    write_json_atomic(root / SPEC_FILE, content)
    for unit, sources in corpus.items():
        infos = [_write_source(root, unit, name, splits, spec) for name, splits in sources.items()]
        of_unit = {"sources": [asdict(info) for info in infos], "documents_blake3": "0" * 64}
        commit_unit(root, unit, spec.spec_hash, of_unit)
        for info in infos:
            merged[info.name] = merged[info.name] + info if info.name in merged else info
    return finish_dataset(root, rows_manifest(spec, (), tuple(merged[name] for name in sorted(merged))), corpus)


def _write_source(
    root: Path, unit: str, name: str, splits: dict[str, dict[int, npt.NDArray[np.uint16]]], spec: ShardSpec
) -> SourceInfo:
    found = {}
    for split, by_ordinal in splits.items():
        writer, totals = ShardWriter(root, f"{name}/{split}", unit, spec), Totals()
        items = list(by_ordinal.items())
        for start in range(0, len(items), WINDOW_DOCUMENTS):
            window = items[start : start + WINDOW_DOCUMENTS]
            rows = pack([ids for _, ids in window], [ordinal for ordinal, _ in window], spec.seq_len)
            writer.add(rows)
            lengths = [len(ids) + 2 for _, ids in window]
            padding = rows.tokens_RT.size - sum(lengths)
            cut = sum(length > spec.seq_len for length in lengths)
            totals += Totals(len(window), sum(lengths), rows.rows, padding, 3 * sum(lengths), cut, 1)
        found[split] = SplitInfo(totals, writer.finish())
    return SourceInfo(name, name, found["train"], found["eval"])


def read_folder(root: Path) -> Corpus:
    """All documents of a dataset folder, put together piece by piece; fails where a piece stands twice or is lost."""
    manifest = load_manifest(root)
    corpus: Corpus = {}
    for source in manifest.sources:
        for split in SPLITS:
            for shard in source.split(split).shards:
                unit = Path(shard.file).stem.rsplit("-", 1)[0]
                sources = corpus.setdefault(unit, {})
                documents = sources.setdefault(source.name, {name: {} for name in SPLITS})[split]
                _put_pieces(root, shard, manifest.seq_len, documents)
    for sources in corpus.values():
        for splits in sources.values():
            for documents in splits.values():
                for ordinal, pieces in documents.items():
                    documents[ordinal] = _joined(pieces)
    return corpus


def _put_pieces(root: Path, shard: object, seq_len: int, documents: dict[int, object]) -> None:
    for rows in scan(root, (shard,), seq_len):
        flat = rows.tokens_RT.reshape(-1)
        for start, length, document, offset in zip(
            starts_of(rows), rows.seg_len_I, rows.seg_doc_I.tolist(), rows.seg_off_I.tolist(), strict=True
        ):
            pieces = documents.setdefault(document, {})
            assert offset not in pieces, "a piece stands twice"
            pieces[offset] = flat[start : start + length]


def _joined(pieces: dict[int, npt.NDArray[np.uint16]]) -> npt.NDArray[np.uint16]:
    at = 0
    for offset in sorted(pieces):
        assert offset == at, "a piece is lost"
        at += len(pieces[offset])
    whole = np.concatenate([pieces[offset] for offset in sorted(pieces)])
    assert (whole[0], whole[-1]) == (2, 3)
    return whole[1:-1]


def same_documents(first: Corpus, second: Corpus) -> bool:
    def plain(corpus: Corpus) -> dict[str, object]:
        return {
            f"{unit}/{source}/{split}/{ordinal}": ids.tolist()
            for unit, sources in corpus.items()
            for source, splits in sources.items()
            for split, documents in splits.items()
            for ordinal, ids in documents.items()
        }

    return plain(first) == plain(second)
