"""The manifest of a dataset: which files make it up, where every row lies in them, and the digests that vouch for both.

A dataset is a folder:

    dataset.json                    the top manifest, written last; without it there is no dataset
    tokenizer.json                  a copy of the tokenizer that made the ids
    <source>/train/<unit>-000.arrow rows of one source and split, one or more shards per unit of work
    <source>/train/<unit>-000.sums  a checksum of every row of that shard
    <source>/eval/<unit>-000.arrow  the held-out documents of the same source
    units/<unit>.json               written after the unit's shards; a shard that no unit names does not exist

Building imports this module, so it imports neither torch nor the tokenizer library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import blake3

from rxt_dist.data.inputs import InputFile
from rxt_dist.data.origin import maker, refusal
from rxt_dist.data.rows import BOUNDARY_POLICY, SPECIAL_TOKENS
from rxt_dist.errors import DataError

FORMAT_NAME = "rxt-shards"
FORMAT_VERSION = 1

DATASET_FILE = "dataset.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "eval")
SHARD_SUFFIX, SUMS_SUFFIX = ".arrow", ".sums"

_READ_BYTES = 1 << 22


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints
# ---------------------------------------------------------------------------------------------------------------------


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text. A dataclass counts as its fields."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=vars)


def digest_json(value: Any) -> str:
    """Hex sha256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def blake3_file(path: Path) -> str:
    """Hex blake3 of a file, read in blocks (a memory map would turn a failing disk into a killed process)."""
    digest = blake3.blake3()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    return str(digest.hexdigest())


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


class RecordBatchInfo(NamedTuple):
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
    batches: tuple[RecordBatchInfo, ...]

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> ShardInfo:
        batches = tuple(RecordBatchInfo(*batch) for batch in value["batches"])
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
    """One source: what a mixture weighs and an evaluation reports by itself."""

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

    `files` are all other files of the folder; `rxt_dist.data.sealing.finish_dataset` fills it in.
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
