"""The same documents in rows of another length: one build serves models of several context lengths.

A unit's documents are put together from their pieces, window by window, and packed again; they keep their unit,
ordinal, source and split, so a token still leads back to its text. The units are those of the first dataset.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.building.builder import Built, Job, Sharing, UnitWork, build, merged_sources, rows_manifest
from data_prep.building.folder import ORIGIN_FILE, PLAN_FILE, SPEC_FILE, UNITS_FOLDER, Say
from data_prep.building.workers import Report, Show
from data_prep.shards.rows import gather, pieces_of
from data_prep.shards.system_errors import dataset_errors
from data_prep.units import Unit
from rxt_dist.data.manifest import (
    FORMAT_VERSION,
    SPLITS,
    TOKENIZER_FILE,
    DatasetManifest,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    Totals,
    load_manifest,
)
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS, pack
from rxt_dist.data.rows import BOS_ID, BOUNDARY_POLICY, EOS_ID
from rxt_dist.data.verify import require_sound, shard_problem, verify_quick
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import json_bytes

_WINDOW_TOKENS = 1 << 23  # a window of very long documents ends here, to bound memory

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RepackRequest(Sharing):
    """Rows of `seq_len` in `out`, from the documents of `dataset`."""

    dataset: Path
    out: Path
    seq_len: int


@dataclass(frozen=True)
class RepackResult(Built):
    """The new dataset."""

    manifest: DatasetManifest | None = None


def repack(request: RepackRequest, say: Say = lambda line: None, show: Show = lambda progress: None) -> RepackResult:
    """Make, or finish making, a dataset of another row length.

    Args:
        say: told in a sentence what is being done.
        show: told how far it is.

    Raises:
        DataError: a damaged dataset, an `out` that holds something else, or something that cannot be read or written.
        ConfigError: a row length that cannot be, or the one that the dataset has; an `out` inside the dataset or around
            it.
        DiskError: too little space.
    """
    job = RepackJob(request, say, show)
    with dataset_errors(request.out):
        return build(job)


class RepackJob(Job[RepackResult]):
    """The units of a dataset to rows of another length."""

    doing, purpose = "Repacking", "The repacked shards"
    result = RepackResult

    def __init__(self, request: RepackRequest, say: Say, show: Show) -> None:
        super().__init__(request.out, request.seq_len, request, say, show)
        require_sound(verify_quick(request.dataset), request.dataset)
        self._dataset, self._old = request.dataset, load_manifest(request.dataset)
        if request.seq_len == self._old.seq_len:
            raise ConfigError(f"--seq-len is {request.seq_len}, which the rows of {request.dataset} have already.")
        if self._old.boundaries != BOUNDARY_POLICY:
            raise ConfigError(
                f"{request.dataset} holds rows that are no plain documents (boundaries '{self._old.boundaries}'), so "
                f"they cannot be cut anew. Build it again with another --seq-len."
            )
        _check_out(request)

    def plan(self) -> Sequence[Unit]:
        """The units as the manifest knows them: a copy of a file that somebody left in the folder is no unit."""
        paths = (Path(item.file) for item in self._old.files)
        names = sorted(path.stem for path in paths if path.parent.name == UNITS_FOLDER and path.suffix == ".json")
        return [Unit(name, (), _shard_bytes(self._dataset, name)) for name in names]

    def settings(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "packing_version": PACKING_VERSION,
            "window_documents": WINDOW_DOCUMENTS,
            "seq_len": self.seq_len,
            "repacked_from": self._old.root_digest,
        }

    def tokenizer_json(self) -> str:
        return (self._dataset / TOKENIZER_FILE).read_text(encoding="utf-8")

    def files(self) -> dict[str, bytes]:
        """Units stay those of the first build, so its plan and settings still lead from a token to its text."""
        plan, first = self._dataset / PLAN_FILE, self._dataset / ORIGIN_FILE
        found = {PLAN_FILE: plan.read_bytes()} if plan.is_file() else {}
        if first.is_file():
            settings = json.loads(first.read_text(encoding="utf-8"))["build"]
        else:
            settings = json.loads((self._dataset / SPEC_FILE).read_text(encoding="utf-8"))
        origin = {"dataset": str(self._dataset.resolve()), "build": settings}
        return found | {ORIGIN_FILE: json_bytes(origin)}

    def needed_bytes(self, units: Sequence[Unit], spec: ShardSpec | None) -> int:
        return sum(unit.text_bytes for unit in units) * 6 // 5

    def work(self, spec: ShardSpec, units: Sequence[Unit], threads: bool) -> RepackWork:
        return RepackWork(self.out, spec, self._dataset, self._old.seq_len)

    def merge(self, spec: ShardSpec, contents: Sequence[Mapping[str, Any]]) -> RepackResult:
        sources = merged_sources(contents, SourceInfo.from_dict)
        _require_same_documents({source.name: source for source in sources}, self._old)
        return RepackResult(manifest=rows_manifest(spec, self._old.inputs, sources))


def _check_out(request: RepackRequest) -> None:
    """Refuse to put one dataset into the folder of another: what lies there would pass for a part of it."""
    out, dataset = request.out.resolve(), request.dataset.resolve()
    if out == dataset:
        raise ConfigError(f"--out is {request.out}, the dataset itself. Name a new folder.")
    if out.is_relative_to(dataset) or dataset.is_relative_to(out):
        where = "inside" if out.is_relative_to(dataset) else "around"
        raise ConfigError(f"--out is {request.out}, a folder {where} the dataset {request.dataset}. Name another one.")


def _shard_bytes(dataset: Path, unit: str) -> int:
    content = json.loads((dataset / UNITS_FOLDER / f"{unit}.json").read_text(encoding="utf-8"))
    return sum(shard["bytes"] for source in content["sources"] for split in SPLITS for shard in source[split]["shards"])


def _require_same_documents(sources: dict[str, SourceInfo], old: DatasetManifest) -> None:
    """Refuse what repacking may not change, whatever the reason may be."""
    olds = {source.name: source for source in old.sources}
    for name in sorted(sources.keys() | olds.keys()):
        for split in SPLITS:
            ours, theirs = (side.get(name, SourceInfo(name, "")).split(split).totals for side in (sources, olds))
            if (ours.documents, ours.tokens) != (theirs.documents, theirs.tokens):
                raise DataError(
                    f"{name}/{split} came out with {ours.documents:,} documents of {ours.tokens:,} tokens, but the "
                    f"dataset has {theirs.documents:,} of {theirs.tokens:,}: its units/*.json are not those of its "
                    f"shards. Build it again into another folder."
                )


# ---------------------------------------------------------------------------------------------------------------------
# One unit
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RepackWork(UnitWork):
    """Packs units of `dataset`, whose rows have `old_seq_len` tokens."""

    dataset: Path
    old_seq_len: int

    def builder(self) -> Callable[[Unit, Report], Mapping[str, Any]]:
        return self._repack

    def _repack(self, unit: Unit, report: Report) -> Mapping[str, Any]:
        """Pack one unit's documents again. `report` is told (bytes of shards, tokens) so far.

        Raises:
            DataError: a damaged shard.
        """
        content: dict[str, Any] = json.loads(
            (self.dataset / UNITS_FOLDER / f"{unit.name}.json").read_text(encoding="utf-8")
        )
        sources, passed, tokens = [], 0, 0
        for value in content["sources"]:
            source = SourceInfo.from_dict(value)
            splits = {}
            for name in SPLITS:
                splits[name] = _repack_split(self, source.name, name, source.split(name), unit.name)
                passed += sum(shard.bytes for shard in source.split(name).shards)
                tokens += splits[name].totals.tokens
                report(passed, tokens)
            sources.append(SourceInfo(source.name, source.language, splits["train"], splits["eval"]))
        size = sum(shard.bytes for source in sources for name in SPLITS for shard in source.split(name).shards)
        totals = sum((source.train.totals + source.eval.totals for source in sources), Totals())
        new = {"sources": [asdict(source) for source in sources], "totals": asdict(totals), "bytes": size}
        return content | new


def _repack_split(work: RepackWork, source: str, split: str, old: SplitInfo, unit: str) -> SplitInfo:
    for shard in old.shards:
        # Damage must not be packed into new shards, whose hashes would vouch for it.
        problem = shard_problem(work.dataset / shard.file, shard)
        if problem:
            raise DataError(
                f"{work.dataset / shard.file} {problem}. Mend it with `rxt-dist data verify {work.dataset} --repair`."
            )
    writer = ShardWriter(work.out, f"{source}/{split}", unit, work.spec)
    seq_len, rows, cut = work.spec.seq_len, 0, 0
    for ordinals, lengths, tokens in documents_by_window(work.dataset, old.shards, work.old_seq_len):
        framed = np.split(tokens, np.cumsum(lengths)[:-1])
        packed = pack([ids[1:-1] for ids in framed], ordinals.tolist(), seq_len)
        writer.add(packed)
        rows += packed.rows
        cut += int((lengths > seq_len).sum())
    # The text itself is not here any more: its bytes and literals are what they were.
    totals = replace(old.totals, rows=rows, padding=rows * seq_len - old.totals.tokens, split_documents=cut)
    return SplitInfo(totals, writer.finish())


def documents_by_window(
    root: Path, shards: tuple[ShardInfo, ...], seq_len: int
) -> Iterator[tuple[Int32Array, Int64Array, npt.NDArray[np.uint16]]]:
    """The documents of one unit, source and split: ordinals [N], lengths [N], and their tokens one after another with
    BOS and EOS (uint16), for up to 4,096 documents or some 8 million tokens at a time.

    Raises:
        DataError: the pieces do not make whole documents.
    """
    columns = pieces_of(root, shards, seq_len)
    order = np.lexsort((columns[4], columns[3]))
    row_I, start_I, length_I, document_I, offset_I = (column[order] for column in columns)
    ordinals, firsts = np.unique(document_I, return_index=True)
    edges = np.append(firsts, len(document_I))
    before_I = np.cumsum(length_I) - length_I
    lengths = np.add.reduceat(length_I, firsts, dtype=np.int64) if len(firsts) else firsts
    if not np.array_equal(before_I - np.repeat(before_I[firsts], np.diff(edges)), offset_I):
        raise DataError(f"The pieces in {[shard.file for shard in shards]} do not make whole documents: damaged data.")
    for first, last in _windows(lengths):
        here = slice(int(edges[first]), int(edges[last]))
        tokens = gather(root, shards, seq_len, row_I[here], start_I[here], length_I[here])
        ends = np.cumsum(lengths[first:last])
        if not ((tokens[ends - 1] == EOS_ID).all() and (tokens[ends - lengths[first:last]] == BOS_ID).all()):
            raise DataError(f"A document in {[shard.file for shard in shards]} is not whole: damaged data.")
        yield ordinals[first:last], lengths[first:last], tokens


def _windows(lengths: Int64Array) -> Iterator[tuple[int, int]]:
    first = tokens = 0
    for index, length in enumerate(lengths.tolist()):
        tokens += length
        if index + 1 - first == WINDOW_DOCUMENTS or tokens >= _WINDOW_TOKENS:
            yield first, index + 1
            first, tokens = index + 1, 0
    if first < len(lengths):
        yield first, len(lengths)
