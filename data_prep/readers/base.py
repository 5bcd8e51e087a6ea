"""What every reader is given and gives back: inputs, slices of them, units of slices, raw records."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from rxt_dist.errors import DataError, nearest

T = TypeVar("T")

_FILES_NAMED = 20


@dataclass(frozen=True)
class HubDataset:
    """What is asked of `datasets.load_dataset`, beside the name."""

    config: str | None
    revision: str | None
    split: str
    data_files: tuple[str, ...]


@dataclass(frozen=True)
class Input:
    """A file, or a dataset of the `datasets` library, and how it is read.

    `name` is the file's path from the given folder on and does not change when the corpus moves; `path` is where it
    lies now (or the dataset's name). `text_column` is settled when the plan is made, so that every slice of a file
    reads the same one. `source` None makes each language a source. `seen` is what the system said of the file when this
    process planned, and no part of a plan.
    """

    name: str
    path: str
    max_document_bytes: int
    bytes: int = 0
    fingerprint: str = ""
    source: str | None = None
    language: str | None = None
    text_column: str | None = None
    language_column: str | None = None
    hub: HubDataset | None = None
    seen: tuple[int, ...] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "seen"}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Input:
        """The inverse of `to_dict`.

        Raises:
            DataError: a field is missing or unknown.
        """
        made = from_fields(Input, value)
        if made.hub is None:
            return made
        hub = from_fields(HubDataset, value["hub"])
        hub = HubDataset(hub.config, hub.revision, hub.split, tuple(hub.data_files))
        return Input(**(vars(made) | {"hub": hub}))


@dataclass(frozen=True)
class Slice:
    """A part of an input that can be read by itself.

    `start` and `stop` count what the format can be cut at: bytes of a .jsonl (the slice owns the lines that begin in
    it), row groups of a .parquet, record batches of an .arrow, rows of a `datasets` dataset; anything else is one
    slice, 0 to 1. `text_bytes` is the text in it, as far as the format tells.
    """

    input: Input
    start: int
    stop: int
    text_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"input": self.input.to_dict()}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Slice:
        """The inverse of `to_dict`.

        Raises:
            DataError: a field is missing or unknown.
        """
        made = from_fields(Slice, value)
        return Slice(Input.from_dict(value["input"]), made.start, made.stop, made.text_bytes)


@dataclass(frozen=True)
class Unit:
    """Work that is committed as one: slices, in order, of one source (without a specification: of all inputs)."""

    name: str
    slices: tuple[Slice, ...]
    text_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "text_bytes": self.text_bytes, "slices": [part.to_dict() for part in self.slices]}

    @staticmethod
    def from_dict(value: dict[str, Any]) -> Unit:
        """The inverse of `to_dict`."""
        return Unit(value["name"], tuple(Slice.from_dict(part) for part in value["slices"]), value["text_bytes"])


@dataclass
class ReadCounts:
    """What was read, mended and skipped.

    `guessed`: documents whose language nothing but the text tells, by what was guessed ("und" is none). `not_text_in`:
    documents that are not text, by file, of the first files with such.
    """

    documents: int = 0
    empty: int = 0
    null_text: int = 0
    too_large: int = 0
    repaired_utf8: int = 0
    not_text: int = 0
    guessed: dict[str, int] = field(default_factory=dict)
    not_text_in: dict[str, int] = field(default_factory=dict)

    def name_not_text(self, file: str, documents: int = 1) -> None:
        """Remember the file in which documents are not text."""
        if file in self.not_text_in or len(self.not_text_in) < _FILES_NAMED:
            self.not_text_in[file] = self.not_text_in.get(file, 0) + documents

    def add(self, other: ReadCounts) -> None:
        """Add what comes after this."""
        for name in ("documents", "empty", "null_text", "too_large", "repaired_utf8", "not_text"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for language, documents in other.guessed.items():
            self.guessed[language] = self.guessed.get(language, 0) + documents
        for file, documents in other.not_text_in.items():
            self.name_not_text(file, documents)


@dataclass(frozen=True)
class Record:
    """One record as stored. `place` tells it from the others of its input; undecodable bytes of the text are lone
    surrogates (Python's surrogateescape), and `valid` says that there is none. A text above the bound is not carried
    along: it is None and `too_large`."""

    place: str
    text: str | None
    language: str | None = None
    valid: bool = False
    too_large: bool = False


@dataclass(frozen=True)
class Fields:
    """The fields that are read of records: all of them, and those of which a table has to have one; what else is to be
    done about a table that has none is the `advice`. A table has to have each of the `asked`."""

    all: tuple[str, ...]
    needed: tuple[str, ...]
    advice: str
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Extent:
    """How an input can be cut: into `parts` (the text bytes of each), or without them anywhere in 0 to `end`."""

    input: Input
    text_bytes: int
    parts: tuple[int, ...] | None = None
    end: int = 0

    def pieces(self, grain: int) -> Iterator[Slice]:
        """Consecutive slices of about `grain` bytes of text, or as small as the format allows."""
        if self.parts is not None:
            for index, size in enumerate(self.parts):
                yield Slice(self.input, index, index + 1, size)
            return
        count = max(1, min(self.end, -(-self.text_bytes // grain)))
        for index in range(count if self.end else 0):
            start, stop = (self.end * edge // count for edge in (index, index + 1))
            text = [self.text_bytes * edge // count for edge in (index, index + 1)]
            yield Slice(self.input, start, stop, text[1] - text[0])


TEXT_COLUMNS = ("text", "content", "document", "body", "raw_content", "article", "story")
LANGUAGE_COLUMNS = ("language", "lang")


def settle_columns(item: Input, columns: Sequence[str]) -> Input:
    """The input with its text column settled, after a look at the columns that it has.

    Raises:
        DataError: a column that is asked for, or any text column, is missing, or stands there twice.
    """
    for column in (item.text_column, item.language_column):
        if column is not None and column not in columns:
            raise DataError(
                f"{item.path} has no column '{column}'; it has {list(columns)}.{nearest(column, columns)} Mend "
                f"text_column or language_column of source '{item.source}'."
            )
    text = item.text_column or next((name for name in TEXT_COLUMNS if name in columns), None)
    if text is None:
        raise DataError(
            f"{item.path} has no text column: it has {list(columns)}, and looked for were {list(TEXT_COLUMNS)}. Name "
            f"the column as text_column of its source, or rename it to 'text'."
        )
    settled = replace(item, text_column=text)
    twice = next((name for name in (text, *language_columns(item, columns)) if columns.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{item.path} has more than one column '{twice}'; rename or remove all but one of them.")
    return settled


def language_columns(item: Input, columns: Sequence[str]) -> list[str]:
    """Columns in which a record's language may stand, of those that there are."""
    wanted = (item.language_column,) if item.language_column else LANGUAGE_COLUMNS
    return [] if item.language else [name for name in wanted if name in columns]


def not_a_language(where: str, found: object) -> DataError:
    """What to raise where a language is no text."""
    return DataError(
        f"{where} has {found} as language, and not text. Name another language_column, or state the `language` of the "
        f"source."
    )


_BLANK = b" \t\r\n\v\f\xef\xbb\xbf"


def is_blank(line: bytes) -> bool:
    """Whether there is nothing in a line but white space and a byte order mark."""
    return not line.strip(_BLANK)


def parse_json(line: str) -> Any:
    """The JSON value in a line; an integer of more digits than Python reads is given as text.

    Raises:
        ValueError: not JSON, or nested more deeply than can be read.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:  # an integer beyond sys.get_int_max_str_digits(), which any field may hold
        return json.loads(line, parse_int=_integer)


def _integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:
        return digits


def from_fields(kind: type[T], value: dict[str, Any]) -> T:
    """A dataclass of exactly these fields.

    Raises:
        DataError: a field is missing or unknown.
    """
    known = {item.name for item in fields(kind) if item.compare}  # type: ignore[arg-type]
    if not isinstance(value, dict) or set(value) != known:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise DataError(
            f"A stored {kind.__name__.lower()} has the fields {found}; expected are {sorted(known)}. It was written by "
            f"another version of this program."
        )
    return kind(**value)
