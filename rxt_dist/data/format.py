"""The shard format: what a row of tokens looks like on disk, and the manifests that vouch for it.

A dataset is a folder:

    dataset.json                    the top manifest, written last; without it there is no dataset
    tokenizer.json                  a copy of the tokenizer that made the ids
    <source>/train/<unit>-000.arrow rows of one source and split, one or more shards per unit of work
    <source>/train/<unit>-000.sums  a checksum of every row of that shard
    <source>/eval/<unit>-000.arrow  the held-out documents of the same source
    units/<unit>.json               written after the unit's shards; a shard that no unit names does not exist

A shard is an uncompressed Arrow IPC file of rows of exactly `seq_len` tokens, so any Arrow reader opens it. Training
does not read it through Arrow: the manifest holds the byte offset of every buffer, and a row is a slice of the file.
Arrow has no checksums, so each shard has a file of them beside it: little-endian uint64 [rows], xxh3_64 over a row's
token bytes followed by the bytes of its segment lengths. A reader checks what it reads, when it reads it.
Building imports this module, so it imports neither torch nor the tokenizer library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import blake3
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from rxt_dist.data.inputs import InputFile
from rxt_dist.data.origin import maker, refusal
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.files import fsync_dir, temporary_path

FORMAT_NAME = "rxt-shards"
FORMAT_VERSION = 1
BOUNDARY_POLICY = "bos-eos"
INTERACTION_BOUNDARIES = "interactions"  # the same, with the parts of an interaction between them
BATCH_ROWS = 4096
SHARD_ROWS = 65_536
MAX_VOCABULARY = 65_536
MAX_SEQ_LEN = 65_535  # a segment length is a uint16, and a segment may fill the row

SPECIAL_TOKENS: dict[str, int] = {
    "[PAD]": 0, "[UNK]": 1, "[BOS]": 2, "[EOS]": 3, "[MASK]": 4,
    "[Q]": 5, "[A]": 6, "[T]": 7, "[C]": 8, "[U]": 9, "[I]": 10,
}  # fmt: skip
PAD_ID, UNK_ID, BOS_ID, EOS_ID, MASK_ID = 0, 1, 2, 3, 4
SPECIAL_COUNT = len(SPECIAL_TOKENS)

DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "eval")
SHARD_SUFFIX, SUMS_SUFFIX = ".arrow", ".sums"

_READ_BYTES = 1 << 22


# ---------------------------------------------------------------------------------------------------------------------
# Rows in memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedRows:
    """R packed rows with S segments in all.

    `tokens_RT` uint16 [R, T], padded with PAD at the end of a row; `seg_count_R` int64 [R], segments in each row;
    `seg_len_S` uint16, `seg_doc_S` uint32 (document ordinal in the unit) and `seg_off_S` uint32 (offset of the piece in
    its document, in tokens, 0 unless the document was cut), each in row order.
    """

    tokens_RT: npt.NDArray[np.uint16]
    seg_count_R: npt.NDArray[np.int64]
    seg_len_S: npt.NDArray[np.uint16]
    seg_doc_S: npt.NDArray[np.uint32]
    seg_off_S: npt.NDArray[np.uint32]

    @property
    def rows(self) -> int:
        return int(self.tokens_RT.shape[0])

    def slice(self, start: int, stop: int) -> PackedRows:
        """Rows [start, stop) with their segments."""
        bounds = np.concatenate(([0], np.cumsum(self.seg_count_R)))
        segments = slice(int(bounds[start]), int(bounds[stop]))
        return PackedRows(
            self.tokens_RT[start:stop],
            self.seg_count_R[start:stop],
            self.seg_len_S[segments],
            self.seg_doc_S[segments],
            self.seg_off_S[segments],
        )


def check_rows(rows: PackedRows, vocab_size: int) -> None:
    """Assert what every reader relies on: ids below the vocabulary, PAD only after the last segment, special ids only
    at a segment's ends (BOS where a document begins, EOS where it may end).

    Raises:
        AssertionError: the packer broke its own rule; this is a bug, never bad input.
    """
    tokens_RT, seq_len = rows.tokens_RT, rows.tokens_RT.shape[1]
    assert int(tokens_RT.max(initial=0)) < vocab_size, f"token id {tokens_RT.max()} >= vocabulary {vocab_size}"
    seg_len = rows.seg_len_S.astype(np.int64)
    row_of = np.repeat(np.arange(rows.rows), rows.seg_count_R)
    used_R = np.bincount(row_of, weights=seg_len, minlength=rows.rows).astype(np.int64)
    assert bool((seg_len > 0).all()), "an empty segment"
    assert bool((used_R <= seq_len).all()), "segments longer than their row"
    ends = np.cumsum(seg_len) + np.repeat(np.cumsum(seq_len - used_R) - (seq_len - used_R), rows.seg_count_R)
    starts = ends - seg_len
    flat = tokens_RT.reshape(-1)
    is_padding = np.arange(seq_len) >= used_R[:, None]
    special = (tokens_RT < SPECIAL_COUNT).reshape(-1)
    assert not bool(tokens_RT[is_padding].any()), "a token other than PAD after the last segment"
    special[is_padding.reshape(-1)] = False
    special[starts[(flat[starts] == BOS_ID) & (rows.seg_off_S == 0)]] = False
    special[ends[flat[ends - 1] == EOS_ID] - 1] = False
    assert not bool(special.any()), "a special id inside a segment"
    assert bool(((flat[starts] == BOS_ID) == (rows.seg_off_S == 0)).all()), "BOS must open exactly the first pieces"


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints
# ---------------------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. A dataclass counts as its fields."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=vars)


def digest_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def tokenizer_fingerprint(tokenizer_json: str) -> str:
    """Hex sha256 over what decides the ids: model, pre-tokenizer, normaliser and added tokens of a tokenizer.json.

    Merges are written as "a b" by older library versions and as ["a", "b"] by newer ones; both give one fingerprint.
    """
    content = json.loads(tokenizer_json)
    model = dict(content["model"])
    if "merges" in model:
        model["merges"] = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model["merges"]]
    kept = {"model": model} | {key: content.get(key) for key in ("pre_tokenizer", "normalizer", "added_tokens")}
    return digest_json(kept)


def require_tokenizer(root: Path, made_with: str, used: str | None) -> None:
    """Raise DataError for data of another tokenizer than the caller's (fingerprints; `used` None asks for nothing)."""
    if used is not None and used != made_with:
        raise DataError(
            f"{root} was made with tokenizer {made_with[:16]}..., but the run uses tokenizer {used[:16]}...: every id "
            f"would mean something else. Use {root / TOKENIZER_FILE}, or build the data again with the other tokenizer."
        )


def blake3_file(path: Path) -> str:
    """Hex blake3 of a file, read in blocks (a memory map would turn a failing disk into a killed process)."""
    digest = blake3.blake3()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


def row_sum(tokens: memoryview, seg_len: memoryview | bytes) -> int:
    """xxh3_64 of one row: its tokens' bytes, then its segment lengths' (both contiguous, little-endian uint16)."""
    digest = xxhash.xxh3_64(tokens)
    digest.update(seg_len)
    return digest.intdigest()


def row_sums(rows: PackedRows) -> npt.NDArray[np.uint64]:
    """`row_sum` of every row, "<u8" [R]."""
    bounds = np.concatenate(([0], np.cumsum(rows.seg_count_R))).tolist()
    sums = [row_sum(rows.tokens_RT[r].data, rows.seg_len_S[bounds[r] : bounds[r + 1]].data) for r in range(rows.rows)]
    return np.array(sums, dtype="<u8")


def sums_file(file: str) -> str:
    """The file of row checksums that belongs to a shard: `x.arrow` has `x.sums`."""
    return file.removesuffix(SHARD_SUFFIX) + SUMS_SUFFIX


# ---------------------------------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Totals:
    """Counts over documents or rows; `tokens` includes BOS and EOS but no padding, `text_bytes` is UTF-8."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    padding: int = 0
    text_bytes: int = 0
    split_documents: int = 0
    escaped_literals: int = 0

    def __add__(self, other: Totals) -> Totals:
        mine, theirs = asdict(self), asdict(other)
        return Totals(**{name: mine[name] + theirs[name] for name in mine})


class BatchInfo(NamedTuple):
    """Where one record batch lies in its file: byte offsets of the buffers that a reader slices.

    A list column has two buffers, int64 list offsets [rows + 1] and the values. In JSON it is a list of these numbers:
    a large dataset has hundreds of thousands of record batches, and names would make its manifest slow to read.
    """

    rows: int
    tokens: int
    seg_len_offsets: int
    seg_len: int
    seg_doc_offsets: int
    seg_doc: int
    seg_off_offsets: int
    seg_off: int


@dataclass(frozen=True)
class ShardInfo:
    """One shard: `file` relative to the dataset folder, `first_document` the smallest ordinal of its first row.

    `blake3` is the hash of the shard, `row_sums_blake3` that of the file of row checksums beside it.
    """

    file: str
    rows: int
    bytes: int
    blake3: str
    row_sums_blake3: str
    first_document: int
    batches: tuple[BatchInfo, ...]

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> ShardInfo:
        batches = tuple(BatchInfo(*batch) for batch in value["batches"])
        return ShardInfo(**{**value, "batches": batches})


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one source and split, in row order."""

    totals: Totals = Totals()
    shards: tuple[ShardInfo, ...] = ()

    def __add__(self, other: SplitInfo) -> SplitInfo:
        return SplitInfo(self.totals + other.totals, self.shards + other.shards)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> SplitInfo:
        return SplitInfo(Totals(**value["totals"]), tuple(ShardInfo.from_dict(shard) for shard in value["shards"]))


@dataclass(frozen=True)
class SourceInfo:
    """One source: the unit of the mixture and of per-language evaluation."""

    name: str
    language: str
    train: SplitInfo = SplitInfo()
    eval: SplitInfo = SplitInfo()

    def split(self, name: str) -> SplitInfo:
        return {"train": self.train, "eval": self.eval}[name]

    def __add__(self, other: SourceInfo) -> SourceInfo:
        language = self.language if self.language == other.language else "mul"
        return replace(self, language=language, train=self.train + other.train, eval=self.eval + other.eval)

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> SourceInfo:
        train, held_out = SplitInfo.from_dict(value["train"]), SplitInfo.from_dict(value["eval"])
        return SourceInfo(value["name"], value["language"], train, held_out)


@dataclass(frozen=True)
class FileInfo:
    """A file of the dataset folder that is neither a shard nor its row checksums."""

    file: str
    bytes: int
    blake3: str


@dataclass(frozen=True)
class DatasetManifest:
    """The top manifest. `root_digest` covers everything that decides a training token, and no time, path or host.

    `files` are all other files of the folder; `rxt_dist.data.spare.finish_dataset` fills it in.
    """

    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    spec_hash: str
    packing_version: int
    inputs: tuple[InputFile, ...]
    sources: tuple[SourceInfo, ...]
    files: tuple[FileInfo, ...] = ()
    boundaries: str = BOUNDARY_POLICY

    @property
    def totals(self) -> Totals:
        return sum((source.train.totals + source.eval.totals for source in self.sources), Totals())

    @property
    def root_digest(self) -> str:
        return digest_json([FORMAT_VERSION, self.seq_len, self.tokenizer_sha256, self.sources])

    def shards(self) -> Iterator[ShardInfo]:
        """Every shard of every source and split."""
        for source in self.sources:
            yield from source.train.shards + source.eval.shards

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "seq_len": self.seq_len,
            "dtype": "uint16",
            "tokenizer": {
                "file": TOKENIZER_FILE,
                "sha256": self.tokenizer_sha256,
                "vocab_size": self.vocab_size,
                "special_tokens": SPECIAL_TOKENS,
            },
            "boundaries": self.boundaries,
            "packing_version": self.packing_version,
            "spec_hash": self.spec_hash,
            "inputs": [item.to_dict() for item in self.inputs],
            "files": [asdict(item) for item in self.files],
            "sources": [asdict(source) for source in self.sources],
            "totals": asdict(self.totals),
            "root_digest": self.root_digest,
        }

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> DatasetManifest:
        return DatasetManifest(
            seq_len=int(value["seq_len"]),
            vocab_size=int(value["tokenizer"]["vocab_size"]),
            tokenizer_sha256=value["tokenizer"]["sha256"],
            spec_hash=value["spec_hash"],
            packing_version=int(value["packing_version"]),
            inputs=tuple(
                InputFile.of_manifest(item, value["boundaries"] == BOUNDARY_POLICY) for item in value["inputs"]
            ),
            sources=tuple(SourceInfo.from_dict(source) for source in value["sources"]),
            files=tuple(FileInfo(**item) for item in value["files"]),
            boundaries=value["boundaries"],
        )


def read_manifest(path: Path) -> bytes | None:
    """The content of a top manifest; None where there is no such file.

    Raises:
        DataError: the system does not let it be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}). Mend its rights, or what is wrong with its disk, and try again."
        ) from error


def load_manifest(directory: Path) -> DatasetManifest:
    """Read and check `directory/dataset.json`.

    Raises:
        DataError: no such dataset, an unfinished one, one that cannot be read, another format version, or a manifest
            that was edited.
    """
    path = directory / DATASET_FILE
    text = read_manifest(path)
    if text is None:
        unfinished = (directory / "units").is_dir()
        hint = (
            f"A build was started there and has not finished; run the same `{maker(directory)}` again to finish it."
            if unfinished
            else "Make one with `rxt-dist data build INPUTS --out DIR`, or check the path."
        )
        raise DataError(f"{directory} is not a dataset: it has no {DATASET_FILE}. {hint}")
    try:
        value = json.loads(text)
        if (value.get("format"), value.get("version")) != (FORMAT_NAME, FORMAT_VERSION):
            raise DataError(refusal(directory, value, f"{FORMAT_NAME!r} version {FORMAT_VERSION}"))
        manifest = DatasetManifest.from_dict(value)
        claimed = value["root_digest"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as a dataset manifest ({type(error).__name__}: {error}). It is damaged or was "
            f"edited by hand; `rxt-dist data verify {directory} --repair` restores it from its copy."
        ) from error
    if claimed != manifest.root_digest:
        raise DataError(
            f"{path} states root digest {claimed} but its content has {manifest.root_digest}: it was edited or "
            f"damaged. `rxt-dist data verify {directory} --repair` restores it from its copy."
        )
    return manifest


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a dataset have in common; it stands in the metadata of every shard's schema."""

    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    packing_version: int
    spec_hash: str
    boundaries: str = BOUNDARY_POLICY

    def __post_init__(self) -> None:
        if not 2 <= self.seq_len <= MAX_SEQ_LEN:
            raise ConfigError(f"The row length is {self.seq_len}; it must be from 2 to {MAX_SEQ_LEN} tokens.")
        if not SPECIAL_COUNT < self.vocab_size <= MAX_VOCABULARY:
            raise ConfigError(
                f"The vocabulary has {self.vocab_size} ids; shards hold 16-bit ids, so at most {MAX_VOCABULARY} fit. "
                f"Train a tokenizer with a smaller --vocab-size."
            )

    def schema(self) -> pa.Schema:
        """The Arrow schema of data format version 1."""
        metadata = {
            "rxt.format": FORMAT_NAME,
            "rxt.version": str(FORMAT_VERSION),
            "rxt.seq_len": str(self.seq_len),
            "rxt.dtype": "uint16",
            "rxt.tokenizer_sha256": self.tokenizer_sha256,
            "rxt.special_tokens": canonical_json(SPECIAL_TOKENS),
            "rxt.boundaries": self.boundaries,
            "rxt.packing_version": str(self.packing_version),
            "rxt.spec_hash": self.spec_hash,
        }
        fields = [
            pa.field("tokens", pa.list_(pa.uint16(), self.seq_len), nullable=False),
            pa.field("seg_len", pa.large_list(pa.uint16()), nullable=False),
            pa.field("seg_doc", pa.large_list(pa.uint32()), nullable=False),
            pa.field("seg_off", pa.large_list(pa.uint32()), nullable=False),
        ]
        return pa.schema(fields, metadata=metadata)


class ShardWriter:
    """Writes the rows of one source, split and unit as `<stem>-000.arrow`, `<stem>-001.arrow`, ...

    A shard and its row checksums appear under their names only whole: written to temporary files, synced, hashed,
    renamed. Rows are checked (`check`) before they are written. Memory: at most one record batch of rows beyond what
    `add` is given.
    """

    def __init__(
        self,
        root: Path,
        directory: str,
        stem: str,
        spec: ShardSpec,
        check: Callable[[PackedRows, int], None] = check_rows,
    ) -> None:
        self._root, self._directory, self._stem, self._spec, self._check = root, directory, stem, spec, check
        self._schema = spec.schema()
        # One record batch of rows, filled in place; the system gives memory only to what is touched.
        self._tokens_RT = np.empty((BATCH_ROWS, spec.seq_len), dtype=np.uint16)
        self._held_rows = 0
        self._segments: list[tuple[npt.NDArray[Any], ...]] = []  # seg_count_R, seg_len_S, seg_doc_S, seg_off_S
        self._shards: list[ShardInfo] = []
        self._file: pa.OSFile | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._shard_rows = 0
        self._sums: list[npt.NDArray[np.uint64]] = []
        self._first_document = 0

    def add(self, rows: PackedRows) -> None:
        """Take R rows; whole record batches are written at once."""
        self._check(rows, self._spec.vocab_size)
        at = 0
        while at < rows.rows:
            part = rows.slice(at, min(at + BATCH_ROWS - self._held_rows, rows.rows))
            self._tokens_RT[self._held_rows : self._held_rows + part.rows] = part.tokens_RT
            self._segments.append((part.seg_count_R, part.seg_len_S, part.seg_doc_S, part.seg_off_S))
            self._held_rows += part.rows
            at += part.rows
            if self._held_rows == BATCH_ROWS:
                self._write_batch()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Write what is left, commit the last shard and return all of them in row order."""
        if self._held_rows:
            self._write_batch()
        if self._writer is not None:
            self._commit()
        return tuple(self._shards)

    def _write_batch(self) -> None:
        columns = [np.concatenate(column) for column in zip(*self._segments, strict=True)]
        self._write(PackedRows(self._tokens_RT[: self._held_rows], *columns))
        self._held_rows, self._segments = 0, []

    def _write(self, rows: PackedRows) -> None:
        if self._writer is None:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(temporary_path(self._final)), "wb")
            self._writer = pa.ipc.new_file(self._file, self._schema)
            self._first_document = int(rows.seg_doc_S[: int(rows.seg_count_R[0])].min())
        bounds = pa.array(np.concatenate(([0], np.cumsum(rows.seg_count_R))), pa.int64())
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens_RT.reshape(-1)), self._spec.seq_len)
        lists = [
            pa.LargeListArray.from_arrays(bounds, pa.array(values))
            for values in (rows.seg_len_S, rows.seg_doc_S, rows.seg_off_S)
        ]
        self._writer.write_batch(pa.record_batch([tokens, *lists], schema=self._schema))
        self._sums.append(row_sums(rows))
        self._shard_rows += rows.rows
        if self._shard_rows == SHARD_ROWS:
            self._commit()

    @property
    def _name(self) -> str:
        return f"{self._directory}/{self._stem}-{len(self._shards):03d}{SHARD_SUFFIX}"

    @property
    def _final(self) -> Path:
        return self._root / self._name

    def _commit(self) -> None:
        assert self._writer is not None
        assert self._file is not None
        self._writer.close()
        self._file.close()
        shard, sums = self._final, self._root / sums_file(self._name)
        temporary_path(sums).write_bytes(np.concatenate(self._sums).tobytes())
        for path in (shard, sums):
            with open(temporary_path(path), "rb") as file:
                os.fsync(file.fileno())
        info = ShardInfo(
            file=self._name,
            rows=self._shard_rows,
            bytes=temporary_path(shard).stat().st_size,
            blake3=blake3_file(temporary_path(shard)),
            row_sums_blake3=blake3_file(temporary_path(sums)),
            first_document=self._first_document,
            batches=batch_offsets(temporary_path(shard)),
        )
        # The shard last: where it stands, its checksums stand.
        for path in (sums, shard):
            os.replace(temporary_path(path), path)
        fsync_dir(shard.parent)
        self._shards.append(info)
        self._writer, self._file, self._shard_rows, self._sums = None, None, 0, []


def batch_offsets(path: Path) -> tuple[BatchInfo, ...]:
    """The byte offsets of every record batch's buffers in an Arrow file, from the addresses in a memory map of it."""
    whole = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    found = []
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        offsets = [batch.column(0).flatten().buffers()[1].address - whole.address]
        for column in range(1, 4):
            _, list_offsets, _, values = batch.column(column).buffers()
            offsets += [list_offsets.address - whole.address, values.address - whole.address]
        found.append(BatchInfo(batch.num_rows, *offsets))
    return tuple(found)
