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
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, Self, TypeVar

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
class Counts:
    """Numbers that are added field by field."""

    def __add__(self, other: Self) -> Self:
        theirs = vars(other)
        return replace(self, **{name: value + theirs[name] for name, value in vars(self).items()})


TotalsT = TypeVar("TotalsT", bound=Counts)
ShardT = TypeVar("ShardT")


@dataclass(frozen=True)
class Split(Generic[TotalsT, ShardT]):
    """The shards of one source and split, in order."""

    totals_type: ClassVar[Any]
    shard_type: ClassVar[Any]

    totals: TotalsT
    shards: tuple[ShardT, ...] = ()

    def __add__(self, other: Self) -> Self:
        return replace(self, totals=self.totals + other.totals, shards=self.shards + other.shards)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        shards = tuple(cls.shard_type.from_dict(shard) for shard in value["shards"])
        return cls(cls.totals_type(**value["totals"]), shards)


SplitT = TypeVar("SplitT", bound=Split[Any, Any])


@dataclass(frozen=True)
class Source(Generic[SplitT]):
    """One source: what a mixture weighs and an evaluation reports by itself."""

    split_type: ClassVar[Any]

    name: str
    language: str
    train: SplitT
    eval: SplitT

    def split(self, name: str) -> SplitT:
        return {"train": self.train, "eval": self.eval}[name]

    def __add__(self, other: Self) -> Self:
        language = self.language if self.language == other.language else "mul"
        return replace(self, language=language, train=self.train + other.train, eval=self.eval + other.eval)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        read = cls.split_type.from_dict
        return cls(value["name"], value["language"], read(value["train"]), read(value["eval"]))


@dataclass(frozen=True)
class FileInfo:
    """A file of the dataset folder that is neither a shard nor its row checksums."""

    file: str
    bytes: int
    blake3: str


SourceT = TypeVar("SourceT", bound=Source[Any])


@dataclass(frozen=True, kw_only=True)
class Manifest(Generic[SourceT]):
    """The top manifest. `root_digest` covers everything that decides a training token, and no time or host.

    Every shard holds the hash of its build, and that the names of the inputs: the same texts in a folder of another
    name give other shards, of equal rows.
    `files` are all other files of the folder; `rxt_dist.data.sealing.finish_dataset` fills it in.
    """

    FORMAT: ClassVar[str]
    VERSION: ClassVar[int]
    source_type: ClassVar[Any]
    own_fields: ClassVar[tuple[str, ...]]  # what only this kind of dataset states

    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    spec_hash: str
    inputs: tuple[InputFile, ...]
    sources: tuple[SourceT, ...]
    files: tuple[FileInfo, ...] = ()

    @property
    @abstractmethod
    def totals(self) -> Counts:
        """Over all sources and splits."""

    @property
    def root_digest(self) -> str:
        return digest_json([self.VERSION, self.seq_len, self.tokenizer_sha256, self.sources])

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": self.FORMAT,
            "version": self.VERSION,
            "seq_len": self.seq_len,
            "dtype": "uint16",
            "tokenizer": {
                "file": TOKENIZER_FILE,
                "sha256": self.tokenizer_sha256,
                "vocab_size": self.vocab_size,
                "special_tokens": SPECIAL_TOKENS,
            },
            **{name: getattr(self, name) for name in self.own_fields},
            "spec_hash": self.spec_hash,
            "inputs": [item.to_dict() for item in self.inputs],
            "files": [asdict(item) for item in self.files],
            "sources": [asdict(source) for source in self.sources],
            "totals": asdict(self.totals),
            "root_digest": self.root_digest,
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        is_documents = value.get("boundaries") == BOUNDARY_POLICY
        return cls(
            seq_len=int(value["seq_len"]),
            vocab_size=int(value["tokenizer"]["vocab_size"]),
            tokenizer_sha256=value["tokenizer"]["sha256"],
            spec_hash=value["spec_hash"],
            inputs=tuple(InputFile.of_manifest(item, is_documents) for item in value["inputs"]),
            sources=tuple(cls.source_type.from_dict(source) for source in value["sources"]),
            files=tuple(FileInfo(**item) for item in value["files"]),
            **{name: value[name] for name in cls.own_fields},
        )


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Totals(Counts):
    """Counts over documents or rows; `tokens` includes BOS and EOS but no padding, `text_bytes` is UTF-8."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0
    padding: int = 0
    text_bytes: int = 0
    split_documents: int = 0
    escaped_literals: int = 0


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
class SplitInfo(Split[Totals, ShardInfo]):
    """The rows of one source and split."""

    totals_type, shard_type = Totals, ShardInfo

    totals: Totals = Totals()


@dataclass(frozen=True)
class SourceInfo(Source[SplitInfo]):
    """A source of rows."""

    split_type = SplitInfo

    train: SplitInfo = SplitInfo()
    eval: SplitInfo = SplitInfo()


@dataclass(frozen=True, kw_only=True)
class DatasetManifest(Manifest[SourceInfo]):
    """The manifest of a dataset of rows: documents, or single interactions."""

    FORMAT, VERSION = FORMAT_NAME, FORMAT_VERSION
    source_type = SourceInfo
    own_fields = ("packing_version", "boundaries")

    packing_version: int
    boundaries: str = BOUNDARY_POLICY

    @property
    def totals(self) -> Totals:
        return sum((source.train.totals + source.eval.totals for source in self.sources), Totals())

    def shards(self) -> Iterator[ShardInfo]:
        """Every shard of every source and split."""
        for source in self.sources:
            yield from source.train.shards + source.eval.shards


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


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
    """Read and check `directory/dataset.json` of a dataset of rows.

    Raises:
        DataError: no such dataset, an unfinished one, one that cannot be read, another format version, or a manifest
            that was edited.
    """
    unfinished = (directory / "units").is_dir()
    hint = (
        f"A build was started there and has not finished; run the same `{maker(directory)}` again to finish it."
        if unfinished
        else "Make one with `rxt-dist data build INPUTS --out DIR`, or check the path."
    )
    wanted = f"{FORMAT_NAME!r} version {FORMAT_VERSION}"
    repair = f"`rxt-dist data verify {directory} --repair` restores it from its copy."
    return load_as(DatasetManifest, directory, hint, lambda value: refusal(directory, value, wanted), repair)


ManifestT = TypeVar("ManifestT", bound=Manifest[Any])


def load_as(
    kind: type[ManifestT], root: Path, hint: str, refused: Callable[[Mapping[str, Any]], str], repair: str
) -> ManifestT:
    """Read and check the manifest of one kind of dataset.

    Args:
        hint: what to do where there is none.
        refused: what to say of a dataset of another kind.
        repair: what to do where it is damaged.

    Raises:
        DataError: with these.
    """
    path = root / DATASET_FILE
    text = read_manifest(path)
    if text is None:
        raise DataError(f"{root} is not a dataset: it has no {DATASET_FILE}. {hint}")
    try:
        value = json.loads(text)
        if (value.get("format"), value.get("version")) != (kind.FORMAT, kind.VERSION):
            raise DataError(refused(value))
        manifest = kind.from_dict(value)
        claimed = value["root_digest"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} cannot be read as a dataset manifest ({type(error).__name__}: {error}): it is damaged or was "
            f"edited by hand. {repair}"
        ) from error
    if claimed != manifest.root_digest:
        raise DataError(
            f"{path} states root digest {claimed} but its content has {manifest.root_digest}: it was edited or "
            f"damaged. {repair}"
        )
    return manifest
