"""Documents -> packed, hashed shards and a manifest; parallel, and safe to kill at any moment.

The input files are grouped into units of work, by size only, so that the number of workers changes nothing in the
result. A unit writes its shards, then its own manifest `units/<unit>.json`: that file is the commit. A build that was
interrupted is finished by running it again; finished units are kept, and the root digest is the same as if nothing had
happened. `dataset.json` is written last.
"""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from tokenizers import Tokenizer

from data_prep.corpora import CorpusFile, Document, ReadCounts, find_files, read_file
from data_prep.tokenizer import load_tokenizer, require_vocabulary_size, save_tokenizer, train_tokenizer
from rxt_dist.data.format import (
    DATASET_FILE,
    FORMAT_VERSION,
    SPECIAL_TOKENS,
    SPLITS,
    TOKENIZER_FILE,
    DatasetManifest,
    InputFile,
    ShardSpec,
    ShardWriter,
    SourceInfo,
    SplitInfo,
    Totals,
    blake3_file,
    digest_json,
    tokenizer_fingerprint,
)
from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS, pack
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import require_free_space, write_atomic, write_json_atomic

SPEC_FILE = "build.json"
EVAL_FRACTION = 0.02

_MIN_UNIT_BYTES, _MAX_UNIT_BYTES, _UNITS_WANTED = 16 << 20, 256 << 20, 64
_WINDOW_TOKENS = 1 << 23  # a window of very long documents ends here, to bound memory
_ENCODE_BYTES = 2 << 20
_CHUNK_CHARACTERS = 1 << 20

# Bytes of shards per byte of input: two bytes a token at two bytes of text a token is already pessimistic; packed
# inputs hold about five times their size in text.
_SHARD_BYTES_PER_TEXT_BYTE, _UNPACKED = 1.0, 5.0
_PACKED_SUFFIXES = (".gz", ".zst", ".parquet")

_CONTROL_LITERAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))
_SPACE_AFTER_WORD = re.compile(r"(?<=\S)[ \n]")

Report = Callable[[int], None]


@dataclass(frozen=True)
class Unit:
    """Work that is committed as one: whole files, in order."""

    name: str
    files: tuple[CorpusFile, ...]
    bytes: int


@dataclass(frozen=True)
class BuildResult:
    """A finished build: the manifest, what reading met, and how many of the units had been finished before."""

    manifest: DatasetManifest
    counts: ReadCounts
    units: int
    units_kept: int


@dataclass(frozen=True)
class BuildRequest:
    """What is to be built. `tokenizer` None trains one of `vocab_size` on the inputs; `unit_bytes` None chooses."""

    inputs: tuple[Path, ...]
    out: Path
    tokenizer: Path | None = None
    seq_len: int = 256
    vocab_size: int = 4096
    eval_fraction: float = EVAL_FRACTION
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    unit_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ConfigError(f"--workers is {self.workers}; at least 1 is needed.")
        if not 0 <= self.eval_fraction < 1:
            raise ConfigError(f"--eval-fraction is {self.eval_fraction}; it must be at least 0 and below 1.")
        if self.tokenizer is None:
            require_vocabulary_size(self.vocab_size)


# ---------------------------------------------------------------------------------------------------------------------
# One unit
# ---------------------------------------------------------------------------------------------------------------------


class _Stream:
    """The documents of one source and split within a unit, packed window by window into shards."""

    def __init__(self, writer: ShardWriter, seq_len: int) -> None:
        self._writer, self._seq_len = writer, seq_len
        self._ids: list[npt.NDArray[np.uint16]] = []
        self._ordinals: list[int] = []
        self._window_tokens = 0
        self.totals = Totals()

    def add(self, item: _Encoded) -> None:
        length = len(item.ids) + 2
        self._ids.append(item.ids)
        self._ordinals.append(item.ordinal)
        self._window_tokens += length
        self.totals += Totals(
            documents=1,
            tokens=length,
            text_bytes=item.text_bytes,
            split_documents=int(length > self._seq_len),
            escaped_literals=item.literals,
        )
        if len(self._ids) == WINDOW_DOCUMENTS or self._window_tokens >= _WINDOW_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if not self._ids:
            return
        rows = pack(self._ids, self._ordinals, self._seq_len)
        self._writer.add(rows)
        self.totals += Totals(rows=rows.rows, padding=rows.tokens_RT.size - self._window_tokens)
        self._ids, self._ordinals, self._window_tokens = [], [], 0

    def finish(self) -> SplitInfo:
        self._flush()
        return SplitInfo(self.totals, self._writer.finish())


@dataclass(frozen=True)
class _Encoded:
    ordinal: int
    ids: npt.NDArray[np.uint16]
    text_bytes: int
    literals: int
    held_out_rank: int  # 64 bits of the hash of the document's text


class _SourceBuilder:
    """Routes one source's documents of a unit to training or evaluation.

    A document is held out when the hash of its text falls below the fraction. So that a small source is not left
    without any, the document with the smallest hash waits; if no other was held out by the end, it is.
    """

    def __init__(self, language: str, streams: dict[str, _Stream], eval_fraction: float) -> None:
        self.language = language
        self._streams = streams
        self._bound = int(eval_fraction * 2**64)
        self._waiting: _Encoded | None = None
        self._any_held_out = eval_fraction == 0

    def add(self, item: _Encoded) -> None:
        if item.held_out_rank < self._bound:
            self._streams["eval"].add(item)
            self._any_held_out = True
        elif not self._any_held_out:
            if self._waiting is None:
                self._waiting = item
                return
            smaller = item.held_out_rank < self._waiting.held_out_rank
            self._streams["train"].add(self._waiting if smaller else item)
            self._waiting = item if smaller else self._waiting
        else:
            self._streams["train"].add(item)

    def finish(self, name: str) -> SourceInfo:
        if self._waiting is not None:
            alone = self._streams["train"].totals.documents == 0
            self._streams["train" if self._any_held_out or alone else "eval"].add(self._waiting)
        return SourceInfo(name, self.language, self._streams["train"].finish(), self._streams["eval"].finish())


class UnitBuilder:
    """Builds and commits units; one in each worker process."""

    def __init__(self, out: Path, spec: ShardSpec, eval_fraction: float) -> None:
        self._out, self._spec, self._eval_fraction = out, spec, eval_fraction
        self._tokenizer: Tokenizer = load_tokenizer(out / TOKENIZER_FILE)

    def build(self, unit: Unit, report: Report) -> None:
        """Write the unit's shards, then its manifest. `report` is called with the bytes of input passed."""
        sources: dict[str, _SourceBuilder] = {}
        counts = ReadCounts()
        ordinal = 0
        for documents in _groups(unit, counts, report):
            for document, ids in zip(documents, self._encode(documents), strict=True):
                if document.source not in sources:
                    sources[document.source] = self._source(unit, document)
                sources[document.source].add(_encoded(ordinal, document, ids))
                ordinal += 1
        finished = [sources[name].finish(name) for name in sorted(sources)]
        content = {
            "spec_hash": self._spec.spec_hash,
            "files": [file.name for file in unit.files],
            "counts": asdict(counts),
            "sources": [asdict(source) for source in finished],
        }
        write_json_atomic(_unit_path(self._out, unit), content)

    def _source(self, unit: Unit, first: Document) -> _SourceBuilder:
        streams = {
            split: _Stream(
                ShardWriter(self._out, f"{first.source}/{split}", unit.name, self._spec),
                self._spec.seq_len,
            )
            for split in SPLITS
        }
        return _SourceBuilder(first.language, streams, self._eval_fraction)

    def _encode(self, documents: list[Document]) -> Iterator[npt.NDArray[np.uint16]]:
        chunks = [list(_chunks(document.text)) for document in documents]
        flat = [chunk for of_document in chunks for chunk in of_document]
        encoded = iter(self._tokenizer.encode_batch_fast(flat, add_special_tokens=False))
        for of_document in chunks:
            yield np.concatenate([np.array(next(encoded).ids, dtype=np.uint16) for _ in of_document])


def _encoded(ordinal: int, document: Document, ids: npt.NDArray[np.uint16]) -> _Encoded:
    rank = int.from_bytes(blake3(document.text.encode()).digest()[:8], "little")
    literals = sum(1 for _ in _CONTROL_LITERAL.finditer(document.text))
    return _Encoded(ordinal, ids, len(document.text.encode()), literals, rank)


def _chunks(text: str) -> Iterator[str]:
    """Cut a very long text where white space follows a word: no token of a byte-level BPE spans that place, so the ids
    are those of the whole, and the tokenizer's memory stays bounded."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        found = _SPACE_AFTER_WORD.search(text, start + _CHUNK_CHARACTERS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _groups(unit: Unit, counts: ReadCounts, report: Report) -> Iterator[list[Document]]:
    """The unit's documents in groups of about 2 MB of text, reporting progress in bytes of input files."""
    group: list[Document] = []
    size = 0
    for file in unit.files:
        left = file.path.stat().st_size
        for document in read_file(file, counts):
            group.append(document)
            size += len(document.text)
            if size >= _ENCODE_BYTES:
                yield group
                step = min(left, size)
                report(step)
                group, size, left = [], 0, left - step
        report(left)
    if group:
        yield group


# ---------------------------------------------------------------------------------------------------------------------
# Planning
# ---------------------------------------------------------------------------------------------------------------------


def plan_units(files: list[CorpusFile], unit_bytes: int | None) -> list[Unit]:
    """Group consecutive files into units of at least `unit_bytes`, by default a 64th of the whole, 16 to 256 MiB."""
    sizes = [file.path.stat().st_size for file in files]
    wanted = unit_bytes or min(max(sum(sizes) // _UNITS_WANTED, _MIN_UNIT_BYTES), _MAX_UNIT_BYTES)
    units: list[Unit] = []
    group: list[CorpusFile] = []
    size = 0
    for index, file in enumerate(files):
        group.append(file)
        size += sizes[index]
        if size >= wanted or index == len(files) - 1:
            units.append(Unit(f"u{len(units):05d}", tuple(group), size))
            group, size = [], 0
    return units


def _unit_path(out: Path, unit: Unit) -> Path:
    return out / "units" / f"{unit.name}.json"


def _finished_unit(out: Path, unit: Unit, spec_hash: str) -> dict[str, Any] | None:
    """The unit's manifest if it is committed and its shards still have their sizes; None means: build it."""
    try:
        content: dict[str, Any] = json.loads(_unit_path(out, unit).read_text())
        shards = [shard for s in content["sources"] for split in SPLITS for shard in s[split]["shards"]]
        sound = all((out / shard["file"]).stat().st_size == shard["bytes"] for shard in shards)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content if sound and content.get("spec_hash") == spec_hash else None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold `out/.lock`, which the system releases when this process ends, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"Another build is writing to {out}. Wait for it, or choose another --out.") from error
        yield


def _check_spec(out: Path, spec: dict[str, Any]) -> dict[str, Any] | None:
    """The spec of an earlier build in `out`, or None; compares the keys that `spec` has.

    Raises:
        DataError: the folder belongs to a build with another spec, or holds something else.
    """
    path = out / SPEC_FILE
    if not path.is_file():
        foreign = sorted(item.name for item in out.iterdir() if not item.name.startswith("."))
        if foreign and foreign != [TOKENIZER_FILE]:
            raise DataError(f"{out} is not empty and is not a dataset (it holds {foreign[:5]}). Choose another --out.")
        return None
    try:
        old: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}). Choose another --out, or delete {out}.") from error
    differences = [_difference(key, old.get(key), value) for key, value in spec.items() if old.get(key) != value]
    if differences:
        raise DataError(
            f"{out} was built with another specification: {'; '.join(differences)}. A dataset is never changed in "
            f"place: choose another --out, or delete the folder."
        )
    return old


def _difference(key: str, old: Any, new: Any) -> str:
    if key != "inputs":
        return f"{key} was {old} and is now {new}"
    before, now = ({item["file"]: item["blake3"] for item in side or []} for side in (old, new))
    changed = [f"+{name}" for name in now.keys() - before.keys()]
    changed += [f"-{name}" for name in before.keys() - now.keys()]
    changed += [f"{name} (content)" for name in now.keys() & before.keys() if now[name] != before[name]]
    return f"the input files differ ({', '.join(sorted(changed)[:5])}{', ...' if len(changed) > 5 else ''})"


def _needed_bytes(units: list[Unit]) -> int:
    needed = 0.0
    for unit in units:
        for file in unit.files:
            unpacked = _UNPACKED if file.path.name.endswith(_PACKED_SUFFIXES) else 1.0
            needed += file.path.stat().st_size * unpacked * _SHARD_BYTES_PER_TEXT_BYTE
    return int(needed) + (1 << 20)


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


def build_dataset(
    request: BuildRequest,
    say: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BuildResult:
    """Build, or finish building, a dataset.

    Args:
        say: told in a sentence what is being done.
        progress: told bytes of input done and in all, every half second or so.

    Raises:
        DataError: unusable input, an empty corpus, or a folder that belongs to something else.
        ConfigError: a row length, vocabulary or fraction that cannot be.
        DiskError: too little space.
    """
    files = find_files(request.inputs)
    with _locked(request.out):
        say(f"Hashing {len(files)} input files")
        inputs = [InputFile(file.name, file.path.stat().st_size, blake3_file(file.path)) for file in files]
        base = {
            "format_version": FORMAT_VERSION,
            "packing_version": PACKING_VERSION,
            "window_documents": WINDOW_DOCUMENTS,
            "seq_len": request.seq_len,
            "eval_fraction": request.eval_fraction,
            "unit_bytes": request.unit_bytes,
            "trained_vocab_size": None if request.tokenizer else request.vocab_size,
            "inputs": [asdict(item) for item in inputs],
        }
        earlier = _check_spec(request.out, base)
        for leftover in request.out.rglob(".*.tmp.*"):
            leftover.unlink()
        units = plan_units(files, request.unit_bytes)
        if earlier is None:
            require_free_space(request.out, _needed_bytes(units), "Building the shards")
        tokenizer_sha256 = tokenizer_fingerprint(_tokenizer_text(request, files, earlier is not None, say))
        spec = base | {"tokenizer_sha256": tokenizer_sha256}
        _check_spec(request.out, spec)
        shard_spec = ShardSpec(
            seq_len=request.seq_len,
            vocab_size=load_tokenizer(request.out / TOKENIZER_FILE).get_vocab_size(),
            tokenizer_sha256=tokenizer_sha256,
            packing_version=PACKING_VERSION,
            spec_hash=digest_json(spec),
        )
        write_json_atomic(request.out / SPEC_FILE, spec)
        return _build_units(request, units, shard_spec, inputs, say, progress)


def _tokenizer_text(request: BuildRequest, files: list[CorpusFile], again: bool, say: Callable[[str], None]) -> str:
    """Put the tokenizer into the dataset folder (given, kept from the interrupted build, or trained now)."""
    target = request.out / TOKENIZER_FILE
    if request.tokenizer is not None:
        load_tokenizer(request.tokenizer)
        text = request.tokenizer.read_text()
        if not (again and target.is_file()):
            write_atomic(target, text)
        return text
    if not (again and target.is_file()):
        say(f"No --tokenizer given: training one with {request.vocab_size} ids on the inputs")
        counts = ReadCounts()
        documents = (document for file in files for document in read_file(file, counts))
        save_tokenizer(train_tokenizer(documents, request.vocab_size), target)
    return target.read_text()


def _build_units(
    request: BuildRequest,
    units: list[Unit],
    spec: ShardSpec,
    inputs: list[InputFile],
    say: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> BuildResult:
    out = request.out
    (out / "units").mkdir(exist_ok=True)
    pending = [unit for unit in units if _finished_unit(out, unit, spec.spec_hash) is None]
    if pending:
        require_free_space(out, _needed_bytes(pending), "Building the shards")
        processes = min(request.workers, len(pending))
        say(f"Building {len(pending)} of {len(units)} units with {processes} process{'es' * (processes > 1)}")
        if processes == 1:
            _build_here(request, pending, spec, progress)
        else:
            _build_in_pool(request, pending, spec, processes, progress)
    contents = [_finished_unit(out, unit, spec.spec_hash) for unit in units]
    sources: dict[str, SourceInfo] = {}
    counts = ReadCounts()
    for content in contents:
        assert content is not None, "a unit vanished while the build held the lock"
        counts.add(ReadCounts(**content["counts"]))
        for value in content["sources"]:
            source = SourceInfo.from_dict(value)
            sources[source.name] = sources[source.name] + source if source.name in sources else source
    if not sources:
        raise DataError(
            f"The corpus is empty: {len(inputs)} files hold no usable document ({counts.empty} empty, "
            f"{counts.not_text} not text). Check the inputs {[str(path) for path in request.inputs]}."
        )
    manifest = DatasetManifest(
        seq_len=spec.seq_len,
        vocab_size=spec.vocab_size,
        tokenizer_sha256=spec.tokenizer_sha256,
        spec_hash=spec.spec_hash,
        packing_version=PACKING_VERSION,
        inputs=tuple(inputs),
        sources=tuple(sources[name] for name in sorted(sources)),
    )
    write_json_atomic(out / DATASET_FILE, manifest.to_dict())
    return BuildResult(manifest, counts, len(units), len(units) - len(pending))


def _build_here(
    request: BuildRequest, pending: list[Unit], spec: ShardSpec, progress: Callable[[int, int], None]
) -> None:
    """One process; with more than one worker asked for, the tokenizer's own threads use the other cores."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if request.workers > 1 else "false"
    builder = UnitBuilder(request.out, spec, request.eval_fraction)
    total, done = sum(unit.bytes for unit in pending), 0

    def report(step: int) -> None:
        nonlocal done
        done += step
        progress(done, total)

    for unit in pending:
        builder.build(unit, report)


_worker: UnitBuilder
_worker_done: Any


def _start_worker(out: Path, spec: ShardSpec, eval_fraction: float, done: Any) -> None:
    global _worker, _worker_done
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker, _worker_done = UnitBuilder(out, spec, eval_fraction), done


def _end_with_parent() -> None:
    """Without this a worker would wait for work for ever after `kill -9` of the build."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(unit: Unit) -> None:
    def report(step: int) -> None:
        with _worker_done.get_lock():
            _worker_done.value += step

    _worker.build(unit, report)


def _build_in_pool(
    request: BuildRequest,
    pending: list[Unit],
    spec: ShardSpec,
    processes: int,
    progress: Callable[[int, int], None],
) -> None:
    # Spawned, not forked: the tokenizer's thread pool does not survive a fork, and the lock must not be inherited.
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    total = sum(unit.bytes for unit in pending)
    arguments = (request.out, spec, request.eval_fraction, done)
    with ProcessPoolExecutor(processes, context, _start_worker, arguments) as pool:
        # Largest first, so that no long unit is left to one worker at the end.
        running: set[Future[None]] = {pool.submit(_work, u) for u in sorted(pending, key=lambda u: -u.bytes)}
        try:
            while running:
                finished, running = wait(running, timeout=0.5, return_when=FIRST_EXCEPTION)
                for future in finished:
                    future.result()
                progress(done.value, total)
        except BrokenProcessPool as error:
            raise DataError(
                "A worker process of the build was killed, most likely for lack of memory. Finished units are kept: "
                "run the same command again with fewer --workers."
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
