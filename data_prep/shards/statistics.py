"""What is in a dataset: lengths, ids, duplicates, shares. Figures of documents and ids come from scanning the rows.

A document's last piece ends in EOS and knows where it began, so its end alone gives the length of the whole document:
lengths need nothing to be put together, and a sample of rows is a fair sample of documents. Duplicates are found by
the 64-bit hash of a document's ids. A sample says nothing about them, nor about what never occurs: of it these figures
are None.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data_prep.building.processes import worker_context
from data_prep.shards.rows import read_rows, starts_of, unit_name
from rxt_dist.data.manifest import SPLITS, DatasetManifest, ShardInfo, SourceInfo
from rxt_dist.data.rows import EOS_ID, MAX_VOCABULARY, PAD_ID, SPECIAL_COUNT, UNK_ID, PackedRows

# Above this many tokens only a sample is scanned unless the whole is asked for.
WHOLE_TOKENS = 2_000_000_000
SAMPLE_ROWS = 16_384
TOP_IDS = 25
_PERCENTILES = (10, 50, 90, 99)
_COUNT_AT_ONCE = 1 << 20  # numpy counts a copy of 8 bytes an id
_PROCESS_TOKENS = 50_000_000  # less than this is done before processes have started
_AHEAD = 4  # shards a process that may be scanned before their turn

Int64Array = npt.NDArray[np.int64]
Uint32Array = npt.NDArray[np.uint32]
Uint64Array = npt.NDArray[np.uint64]


def _no_ids() -> Int64Array:
    return np.zeros(MAX_VOCABULARY, dtype=np.int64)


def _empty(kind: type[np.generic]) -> npt.NDArray[Any]:
    return np.empty(0, dtype=kind)


def _no_pieces() -> Uint64Array:
    return np.empty((0, 5), dtype=np.uint64)


@dataclass
class Scan:
    """What scanning some rows found.

    `ids`: int64 [65,536], how often each id stands there, padding excluded. `lengths`: uint32, tokens, BOS and EOS
    included, of every document whose end was seen. `hashes`: uint64, of every document that was seen whole. `pieces`:
    what was seen of cut documents, uint64 [P, 5] of (document, offset, length, hash, whether it is the last), until
    `joined` takes them.
    """

    rows: int = 0
    tokens: int = 0
    padding: int = 0
    ids: Int64Array = field(default_factory=_no_ids)
    lengths: Uint32Array = field(default_factory=lambda: _empty(np.uint32))
    hashes: Uint64Array = field(default_factory=lambda: _empty(np.uint64))
    pieces: Uint64Array = field(default_factory=_no_pieces)

    @staticmethod
    def join(parts: Iterable[Scan]) -> Scan:
        """All of it as one; of each part nothing but lengths, hashes and pieces is kept while the next is made."""
        rows = tokens = padding = 0
        ids = _no_ids()
        lengths, hashes, pieces = [_empty(np.uint32)], [_empty(np.uint64)], [_no_pieces()]
        for part in parts:
            rows += part.rows
            tokens += part.tokens
            padding += part.padding
            ids += part.ids
            lengths.append(part.lengths)
            hashes.append(part.hashes)
            pieces.append(part.pieces)
        return Scan(rows, tokens, padding, ids, np.concatenate(lengths), np.concatenate(hashes), np.concatenate(pieces))

    def joined(self) -> Scan:
        """The cut documents of one unit put together: a hash for each of which every piece is here; the other pieces
        stay."""
        if not len(self.pieces):
            return self
        pieces = self.pieces[np.lexsort((self.pieces[:, 1], self.pieces[:, 0]))]
        _, firsts = np.unique(pieces[:, 0], return_index=True)
        hashes, rest = [], [pieces[:0]]
        for document in np.split(pieces, firsts[1:]):
            ends = document[:, 1] + document[:, 2]
            if document[0, 1] == 0 and document[-1, 4] and np.array_equal(ends[:-1], document[1:, 1]):
                hashes.append(xxhash.xxh3_64_intdigest(document[:, 1:4].tobytes()))
            else:
                rest.append(document)
        found = np.concatenate([self.hashes, np.array(hashes, dtype=np.uint64)])
        return Scan(self.rows, self.tokens, self.padding, self.ids, self.lengths, found, np.concatenate(rest))


def scan_rows(rows: PackedRows) -> Scan:
    """Figures of R rows in memory."""
    lengths = rows.seg_len_I.astype(np.int64)
    starts = starts_of(rows)
    ends = starts + lengths
    flat = rows.tokens_RT.reshape(-1)
    offsets = rows.seg_off_I.astype(np.int64)
    last = flat[ends - 1] == EOS_ID
    ids = _no_ids()
    for start in range(0, len(flat), _COUNT_AT_ONCE):
        ids += np.bincount(flat[start : start + _COUNT_AT_ONCE], minlength=MAX_VOCABULARY)
    padding = rows.tokens_RT.size - int(lengths.sum())
    ids[PAD_ID] -= padding
    view = flat.data.cast("B")
    hash_of = xxhash.xxh3_64_intdigest
    pairs = zip((2 * starts).tolist(), (2 * ends).tolist(), strict=True)
    hashes = np.array([hash_of(view[start:end]) for start, end in pairs], dtype=np.uint64)
    whole = last & (offsets == 0)
    cut = np.flatnonzero(~whole)
    columns = (rows.seg_doc_I, rows.seg_off_I, rows.seg_len_I, hashes, last)
    pieces = np.stack([column[cut].astype(np.uint64) for column in columns], axis=1)
    ended = (offsets + lengths)[last].astype(np.uint32)
    return Scan(rows.rows, int(lengths.sum()), padding, ids, ended, hashes[whole], pieces)


def scan_shard(root: Path, shard: ShardInfo, seq_len: int, wanted: Int64Array | None) -> Scan:
    """Scan one shard, or only its rows `wanted` (int64, ascending).

    Raises:
        DataError: it is missing or damaged.
    """
    return Scan.join(_scans(root, shard, seq_len, wanted)).joined()


def _scans(root: Path, shard: ShardInfo, seq_len: int, wanted: Int64Array | None) -> Iterator[Scan]:
    first = 0
    for number, batch in enumerate(shard.batches):
        here = None if wanted is None else wanted[(wanted >= first) & (wanted < first + batch.rows)] - first
        for start, stop in [(0, batch.rows)] if here is None else _runs(here):
            yield scan_rows(read_rows(root, shard, number, seq_len, start, stop))
        first += batch.rows


def _runs(rows: Int64Array) -> list[tuple[int, int]]:
    """Ascending row numbers as half-open ranges."""
    if not len(rows):
        return []
    breaks = np.flatnonzero(np.diff(rows) > 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(rows, breaks)]


@dataclass(frozen=True)
class _Task:
    source: str
    split: str
    shard: ShardInfo
    wanted: Int64Array | None

    @property
    def rows(self) -> int:
        return self.shard.rows if self.wanted is None else len(self.wanted)


def scan_dataset(
    root: Path,
    manifest: DatasetManifest,
    sample_rows: int | None,
    workers: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, str], Scan]:
    """Scan a dataset; the result is by (source, split).

    Args:
        sample_rows: at most so many rows of each source and split, the same ones in each call; None: all.
        workers: processes; None: one a core.
        progress: told rows done and in all.

    Raises:
        DataError: a shard is missing or damaged.
    """
    tasks = list(_tasks(manifest, sample_rows))
    total, done = sum(task.rows for task in tasks), 0

    def results() -> Iterator[tuple[_Task, Scan]]:
        nonlocal done
        for task, scan in _scanned(root, manifest.seq_len, tasks, workers or os.cpu_count() or 1):
            yield task, scan
            done += task.rows
            progress(done, total)

    found = {(source.name, split): Scan() for source in manifest.sources for split in SPLITS}
    # Tasks come split by split and, within one, unit by unit.
    for key, of_split in groupby(results(), lambda item: (item[0].source, item[0].split)):
        found[key] = Scan.join(_whole_units(of_split))
    return found


def _whole_units(results: Iterator[tuple[_Task, Scan]]) -> Iterator[Scan]:
    """A document may be cut over the end of a shard, never over that of a unit: pieces left then are of no use."""
    for _, of_unit in groupby(results, lambda item: unit_name(item[0].shard)):
        yield replace(Scan.join(scan for _, scan in of_unit).joined(), pieces=_no_pieces())


def _scanned(root: Path, seq_len: int, tasks: list[_Task], workers: int) -> Iterator[tuple[_Task, Scan]]:
    """The scans in the order of their tasks; only a few are in memory at a time."""
    if workers == 1 or sum(task.rows for task in tasks) * seq_len < _PROCESS_TOKENS:
        for task in tasks:
            yield task, scan_shard(root, task.shard, seq_len, task.wanted)
        return
    ahead: deque[tuple[_Task, Future[Scan]]] = deque()
    with ProcessPoolExecutor(workers, worker_context()) as pool:
        try:
            for task in tasks:
                ahead.append((task, pool.submit(scan_shard, root, task.shard, seq_len, task.wanted)))
                if len(ahead) > _AHEAD * workers:
                    first, future = ahead.popleft()
                    yield first, future.result()
            while ahead:
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _tasks(manifest: DatasetManifest, sample_rows: int | None) -> Iterator[_Task]:
    for number, source in enumerate(manifest.sources):
        for split in SPLITS:
            shards = source.split(split).shards
            rows = sum(shard.rows for shard in shards)
            chosen = None
            if sample_rows is not None and sample_rows < rows:
                chosen = np.sort(np.random.default_rng(number).choice(rows, sample_rows, replace=False))
            first = 0
            for shard in shards:
                wanted = None if chosen is None else chosen[(chosen >= first) & (chosen < first + shard.rows)] - first
                if wanted is None or len(wanted):
                    yield _Task(source.name, split, shard, wanted)
                first += shard.rows


# ---------------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------------


def statistics(
    manifest: DatasetManifest, scans: dict[tuple[str, str], Scan], decode: Callable[[int], str]
) -> dict[str, Any]:
    """All figures as JSON values.

    Totals and shares are the manifest's; lengths, ids and duplicates are of the rows scanned, which `scanned` counts.
    None is what the rows scanned cannot say: duplicates, leakage, and ids that are rare or never used, unless every row
    that matters for the figure was scanned.

    Args:
        decode: the text of an id, for the most frequent ones.
    """
    train = Scan.join(scan for (_, split), scan in scans.items() if split == "train")
    is_whole = train.rows == sum(source.train.totals.rows for source in manifest.sources)
    in_training, duplicates = _distinct(train.hashes)
    tokens = max(manifest.totals.tokens, 1)
    known = in_training if is_whole else None
    sources = {source.name: _source_figures(source, tokens, scans, known) for source in manifest.sources}
    languages: dict[str, dict[str, float]] = {}
    for figures in sources.values():
        entry = languages.setdefault(figures["language"], {"documents": 0, "tokens": 0, "share": 0.0})
        for key in entry:
            entry[key] += figures[key]
    return {
        "scanned": {
            "rows": sum(scan.rows for scan in scans.values()),
            "tokens": sum(scan.tokens for scan in scans.values()),
            "whole": sum(scan.rows for scan in scans.values()) == manifest.totals.rows,
        },
        "sources": sources,
        "languages": languages,
        "ids": _id_figures(train, is_whole, manifest.vocab_size, decode),
        "duplicates": duplicates if is_whole else None,
    }


def _source_figures(
    source: SourceInfo, all_tokens: int, scans: dict[tuple[str, str], Scan], in_training: Uint64Array | None
) -> dict[str, Any]:
    """`in_training`: hashes of the training documents of all sources, sorted; None if not all were scanned."""
    scan, eval_scan = scans[source.name, "train"], scans[source.name, "eval"]
    both = source.train.totals + source.eval.totals
    positions = both.tokens + both.padding
    return {
        "language": source.language,
        "documents": both.documents,
        "tokens": both.tokens,
        "share": both.tokens / all_tokens,
        "bytes_per_token": both.text_bytes / max(both.tokens - 2 * both.documents, 1),
        "tokens_per_document": both.tokens / max(both.documents, 1),
        "padding": both.padding / max(positions, 1),
        "split_documents": both.split_documents,
        "escaped_literals": both.escaped_literals,
        "splits": {split: asdict(source.split(split).totals) for split in SPLITS},
        "unknown_rate": int(scan.ids[UNK_ID]) / max(scan.tokens, 1),
        "lengths": _length_figures(scan.lengths),
        "duplicates": _distinct(scan.hashes)[1] if scan.rows == source.train.totals.rows else None,
        "held_out_also_in_training": (
            None
            if in_training is None or eval_scan.rows != source.eval.totals.rows
            else _count_known(eval_scan.hashes, in_training)
        ),
    }


def _count_known(hashes: Uint64Array, known: Uint64Array) -> int:
    """How many of `hashes` stand in `known`, which is sorted."""
    if not len(known):
        return 0
    at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return int((known[at] == hashes).sum())


def _length_figures(lengths: Uint32Array) -> dict[str, Any]:
    """Document lengths in tokens, with how many lie in [2^k, 2^(k+1)) under the key 2^k."""
    if not len(lengths):
        return {"documents": 0, "histogram": {}}
    powers, counts = np.unique(np.floor(np.log2(lengths)).astype(np.int64), return_counts=True)
    return {
        "documents": len(lengths),
        "mean": float(lengths.mean()),
        **{f"p{p}": float(value) for p, value in zip(_PERCENTILES, np.percentile(lengths, _PERCENTILES), strict=True)},
        "longest": int(lengths.max()),
        "histogram": {str(1 << power): count for power, count in zip(powers.tolist(), counts.tolist(), strict=True)},
    }


def _distinct(hashes: Uint64Array) -> tuple[Uint64Array, dict[str, Any]]:
    """The different hashes, sorted, and how many documents repeat an earlier one exactly."""
    distinct = np.unique(hashes)
    repeats = len(hashes) - len(distinct)
    return distinct, {"documents": len(hashes), "duplicates": repeats, "rate": repeats / max(len(hashes), 1)}


def _id_figures(scan: Scan, is_whole: bool, vocab_size: int, decode: Callable[[int], str]) -> dict[str, Any]:
    counts = scan.ids[:vocab_size]
    ordinary = counts[SPECIAL_COUNT:]
    order = np.argsort(-counts, kind="stable")[:TOP_IDS]
    top = [
        {"id": i, "text": decode(i), "count": int(counts[i]), "share": int(counts[i]) / max(scan.tokens, 1)}
        for i in order.tolist()
        if counts[i]
    ]
    return {
        "vocabulary": vocab_size,
        "unused": int((ordinary == 0).sum()) if is_whole else None,
        "used_once": int((ordinary == 1).sum()) if is_whole else None,
        "unknown": int(counts[UNK_ID]),
        "top": top,
    }
