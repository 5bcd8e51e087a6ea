"""The same documents in rows of another length: one build serves models of several context lengths.

A unit's documents are put together from their pieces, window by window, and packed again; they keep their unit,
ordinal, source and split, so a token still leads back to its text. Like a build, this works unit by unit, commits each
with `units/<unit>.json`, and is finished by running it again after whatever stopped it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.building.folder import SPEC_FILE, UnitFolder, opened
from data_prep.building.unit import UNITS_FOLDER
from data_prep.building.workers import Progress, Report, Show, run_units
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
    digest_json,
    load_manifest,
)
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS, pack
from rxt_dist.data.rows import BOS_ID, BOUNDARY_POLICY, EOS_ID
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.verify import require_sound, shard_problem, verify_quick
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import require_folder, require_free_space, write_atomic, write_json_atomic

ORIGIN_FILE = "origin.json"
PLAN_FILE = "plan.json"
_WINDOW_TOKENS = 1 << 23  # a window of very long documents ends here, to bound memory

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RepackRequest:
    """Rows of `seq_len` in `out`, from the documents of `dataset`."""

    dataset: Path
    out: Path
    seq_len: int
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)


@dataclass(frozen=True)
class RepackResult:
    """The new dataset, and how many of its units an earlier call had finished."""

    manifest: DatasetManifest
    units: int
    units_kept: int


@dataclass(frozen=True)
class RepackJob:
    """What packing a unit again needs to know; it travels to worker processes. `seq_len` is that of the old rows."""

    dataset: Path
    out: Path
    spec: dict[str, Any]
    shard_spec: ShardSpec
    seq_len: int

    def is_done(self, unit: Unit) -> bool:
        """Whether the unit is committed."""
        return UnitFolder(self.out, self.spec).finished(unit.name) is not None

    def open(self) -> Callable[[Unit, Report], None]:
        """Nothing to load."""
        return self._work

    def _work(self, unit: Unit, report: Report) -> None:
        repack_unit(self, unit.name, report)


def repack(
    request: RepackRequest,
    say: Callable[[str], None] = lambda line: None,
    show: Show = lambda progress: None,
) -> RepackResult:
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
    require_folder(request.out)
    require_sound(verify_quick(request.dataset), request.dataset)
    old = load_manifest(request.dataset)
    if request.seq_len == old.seq_len:
        raise ConfigError(f"--seq-len is {request.seq_len}, which the rows of {request.dataset} have already.")
    if old.boundaries != BOUNDARY_POLICY:
        raise ConfigError(
            f"{request.dataset} holds rows that are no plain documents (boundaries '{old.boundaries}'), so they cannot "
            f"be cut anew. Build it again with another --seq-len."
        )
    _check_out(request)
    job = _job(request, old)
    names = _unit_names(old)
    with (
        dataset_errors(request.out),
        opened(request.out, job.spec, (request.dataset / TOKENIZER_FILE).read_text(encoding="utf-8")) as folder,
    ):
        _copy_origin(request)
        units = [Unit(name, (), _shard_bytes(request.dataset, name)) for name in names]
        pending = [unit for unit in units if not job.is_done(unit)]
        if pending:
            require_free_space(request.out, sum(unit.text_bytes for unit in pending) * 6 // 5, "The repacked shards")
            say(f"Packing {len(pending)} of {len(units)} units into rows of {request.seq_len} tokens")
            progress = Progress("repacking", len(units), sum(unit.text_bytes for unit in pending))
            progress.kept = len(units) - len(pending)
            run_units(job, pending, request.workers, progress, show, patient=True)
        manifest = _merge(folder, old, job.shard_spec, names)
    return RepackResult(manifest, len(units), len(units) - len(pending))


def _check_out(request: RepackRequest) -> None:
    """Refuse to put one dataset into the folder of another: what lies there would pass for a part of it."""
    out, dataset = request.out.resolve(), request.dataset.resolve()
    if out == dataset:
        raise ConfigError(f"--out is {request.out}, the dataset itself. Name a new folder.")
    if out.is_relative_to(dataset) or dataset.is_relative_to(out):
        where = "inside" if out.is_relative_to(dataset) else "around"
        raise ConfigError(f"--out is {request.out}, a folder {where} the dataset {request.dataset}. Name another one.")


def _unit_names(manifest: DatasetManifest) -> list[str]:
    """The units as the manifest knows them: a copy of a file that somebody left in the folder is no unit."""
    paths = (Path(item.file) for item in manifest.files)
    return sorted(path.stem for path in paths if path.parent.name == UNITS_FOLDER and path.suffix == ".json")


def _job(request: RepackRequest, old: DatasetManifest) -> RepackJob:
    spec = {
        "format_version": FORMAT_VERSION,
        "packing_version": PACKING_VERSION,
        "window_documents": WINDOW_DOCUMENTS,
        "seq_len": request.seq_len,
        "repacked_from": old.root_digest,
        "tokenizer_sha256": old.tokenizer_sha256,
    }
    shard_spec = ShardSpec(request.seq_len, old.vocab_size, old.tokenizer_sha256, PACKING_VERSION, digest_json(spec))
    return RepackJob(request.dataset, request.out, spec, shard_spec, old.seq_len)


def _copy_origin(request: RepackRequest) -> None:
    """Units stay those of the first build, so its plan and settings still lead from a token to its text."""
    plan = request.dataset / PLAN_FILE
    if plan.is_file():
        write_atomic(request.out / PLAN_FILE, plan.read_bytes())
    first = request.dataset / ORIGIN_FILE
    if first.is_file():
        build = json.loads(first.read_text(encoding="utf-8"))["build"]
    else:
        build = json.loads((request.dataset / SPEC_FILE).read_text(encoding="utf-8"))
    write_json_atomic(request.out / ORIGIN_FILE, {"dataset": str(request.dataset.resolve()), "build": build})


def _shard_bytes(dataset: Path, unit: str) -> int:
    content = json.loads((dataset / UNITS_FOLDER / f"{unit}.json").read_text(encoding="utf-8"))
    return sum(shard["bytes"] for source in content["sources"] for split in SPLITS for shard in source[split]["shards"])


def _merge(folder: UnitFolder, old: DatasetManifest, spec: ShardSpec, names: list[str]) -> DatasetManifest:
    sources: dict[str, SourceInfo] = {}
    for name in names:
        content = folder.finished(name)
        assert content is not None, "a unit vanished while the folder was locked"
        for value in content["sources"]:
            source = SourceInfo.from_dict(value)
            sources[source.name] = sources[source.name] + source if source.name in sources else source
    _require_same_documents(sources, old)
    manifest = DatasetManifest(
        seq_len=spec.seq_len,
        vocab_size=spec.vocab_size,
        tokenizer_sha256=spec.tokenizer_sha256,
        spec_hash=spec.spec_hash,
        packing_version=spec.packing_version,
        inputs=old.inputs,
        sources=tuple(sources[name] for name in sorted(sources)),
    )
    finished = finish_dataset(folder.root, manifest, names)
    for lock in (folder.root / UNITS_FOLDER).glob(".*.lock"):
        lock.unlink(missing_ok=True)
    return finished


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


def repack_unit(job: RepackJob, unit: str, report: Report) -> None:
    """Pack one unit's documents again and commit it. `report` is told (bytes of shards, tokens) so far.

    Raises:
        DataError: a damaged shard.
    """
    content = json.loads((job.dataset / UNITS_FOLDER / f"{unit}.json").read_text(encoding="utf-8"))
    sources, passed, tokens = [], 0, 0
    for value in content["sources"]:
        source = SourceInfo.from_dict(value)
        splits = {}
        for name in SPLITS:
            splits[name] = _repack_split(job, source.name, name, source.split(name), unit)
            passed += sum(shard.bytes for shard in source.split(name).shards)
            tokens += splits[name].totals.tokens
            report(passed, tokens)
        sources.append(SourceInfo(source.name, source.language, splits["train"], splits["eval"]))
    size = sum(shard.bytes for source in sources for name in SPLITS for shard in source.split(name).shards)
    totals = sum((source.train.totals + source.eval.totals for source in sources), Totals())
    new = {"sources": [asdict(source) for source in sources], "totals": asdict(totals), "bytes": size}
    UnitFolder(job.out, job.spec).commit(unit, content | new)


def _repack_split(job: RepackJob, source: str, split: str, old: SplitInfo, unit: str) -> SplitInfo:
    for shard in old.shards:
        # Damage must not be packed into new shards, whose hashes would vouch for it.
        problem = shard_problem(job.dataset / shard.file, shard)
        if problem:
            raise DataError(
                f"{job.dataset / shard.file} {problem}. Mend it with `rxt-dist data verify {job.dataset} --repair`."
            )
    writer = ShardWriter(job.out, f"{source}/{split}", unit, job.shard_spec)
    seq_len, rows, cut = job.shard_spec.seq_len, 0, 0
    for ordinals, lengths, tokens in documents_by_window(job.dataset, old.shards, job.seq_len):
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
