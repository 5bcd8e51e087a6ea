"""Readers: files of text in, `Document`s out, one at a time.

Formats: .txt (a file is a document), .jsonl, .jsonl.gz, .jsonl.zst (a line is a document), .parquet and .arrow (a row
is a document), and folders with any mix of them. What happens to bad input, always counted in `ReadCounts`:

- Empty and white-space documents are skipped.
- Invalid UTF-8 (and lone surrogates in JSON escapes) becomes U+FFFD; a document in which more than 1 % of the
  characters had to be replaced is not text and is skipped.
- A line that is not JSON, a table that cannot be opened or has no text column ends the build: it says that the corpus
  is not what its owner believes.
"""

from __future__ import annotations

import gzip
import importlib
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rxt_dist.errors import DataError

TEXT_COLUMNS = ("text", "content", "document", "body", "raw_content", "article", "story")
LANGUAGE_COLUMNS = ("language", "lang")
SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow")

_REPLACEMENT = "\ufffd"
_MAX_REPLACED = 0.01
_TABLE_ROWS = 1024


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ISO_639_1 = _words(
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st "
    "su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)

# Frequent words that the other language does not have; a guess needs three of them and twice as many as the other.
_STOP_WORDS = {
    "en": _words("the and of is was that with for his her they this have from are were she you which"),
    "pl": _words("się nie jest że był była dla ale jak czy jego przez oraz tego już ich aby która który"),
}


@dataclass(frozen=True)
class Document:
    """One text. `source` names the subset it belongs to (by default its language), `id` is stable across builds."""

    text: str
    language: str
    source: str
    id: str


@dataclass(frozen=True)
class CorpusFile:
    """A file to read: where it is, and `name`, its path from the input's own folder on, which ids and language use."""

    path: Path
    name: str


@dataclass
class ReadCounts:
    """What was read, mended and skipped."""

    documents: int = 0
    empty: int = 0
    repaired_utf8: int = 0
    not_text: int = 0

    def add(self, other: ReadCounts) -> None:
        self.documents += other.documents
        self.empty += other.empty
        self.repaired_utf8 += other.repaired_utf8
        self.not_text += other.not_text


# ---------------------------------------------------------------------------------------------------------------------
# Finding files
# ---------------------------------------------------------------------------------------------------------------------


def find_files(inputs: Iterable[Path]) -> list[CorpusFile]:
    """All readable files of the inputs (files or folders), sorted by name, hidden ones left out.

    Raises:
        DataError: an input does not exist, has an unknown format, or holds nothing readable.
    """
    found: list[CorpusFile] = []
    for given in inputs:
        if given.is_dir():
            files = [_named(path, given.resolve()) for path in sorted(given.rglob("*")) if _is_readable(path, given)]
            if not files:
                raise DataError(f"{given} holds no file that can be read; readable are {', '.join(SUFFIXES)}.")
            found.extend(files)
        elif given.is_file():
            if not given.name.endswith(SUFFIXES):
                raise DataError(f"{given} has a format that cannot be read; readable are {', '.join(SUFFIXES)}.")
            # The folder belongs to the name: pl/stories.txt says that it is Polish.
            resolved = given.resolve()
            found.append(CorpusFile(resolved, f"{resolved.parent.name}/{resolved.name}"))
        else:
            raise DataError(f"The input {given} does not exist. Name files or folders of text.")
    return sorted(set(found), key=lambda file: (file.name, str(file.path)))


def _is_readable(path: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
    return not hidden and path.name.endswith(SUFFIXES) and path.is_file()


def _named(path: Path, root: Path) -> CorpusFile:
    resolved = path.resolve()
    relative = resolved.relative_to(root) if resolved.is_relative_to(root) else Path(path.name)
    return CorpusFile(resolved, (Path(root.name) / relative).as_posix())


# ---------------------------------------------------------------------------------------------------------------------
# Language
# ---------------------------------------------------------------------------------------------------------------------


def language_of_name(name: str) -> str | None:
    """The ISO 639-1 code in a file's name (stories.pl.jsonl) or else in the nearest folder (pl/stories.jsonl)."""
    *folders, file = name.split("/")
    for part in [*reversed(file.split(".")[:-1]), *reversed(folders)]:
        if part.lower() in _ISO_639_1:
            return part.lower()
    return None


def guess_language(text: str) -> str:
    """English, Polish or "und", from frequent words in the first 4,000 characters."""
    words = re.findall(r"\w+", text[:4000].lower())
    counts = {language: sum(word in known for word in words) for language, known in _STOP_WORDS.items()}
    best = max(counts, key=lambda language: counts[language])
    others = max(count for language, count in counts.items() if language != best)
    return best if counts[best] >= 3 and counts[best] >= 2 * others else "und"


def _language_tag(value: str) -> str:
    """The primary part of a tag ("pl-PL" -> "pl"), safe as a folder name."""
    tag = re.sub(r"[^a-z0-9]+", "", re.split(r"[-_.]", value.strip().lower())[0])
    return tag or "und"


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_file(file: CorpusFile, counts: ReadCounts) -> Iterator[Document]:
    """The documents of one file, in order; `counts` is added to while reading.

    Raises:
        DataError: the file is not what its suffix says, or has no text column.
    """
    of_name = language_of_name(file.name)
    for place, raw, language in _records(file):
        text, replaced = _mend(raw)
        if not text.strip():
            counts.empty += 1
            continue
        if replaced > _MAX_REPLACED * len(text):
            counts.not_text += 1
            continue
        counts.repaired_utf8 += replaced > 0
        counts.documents += 1
        tag = _language_tag(language) if language else of_name or guess_language(text)
        yield Document(text, tag, tag, f"{file.name}#{place}")


def _mend(raw: str) -> tuple[str, int]:
    """Text that UTF-8 can hold, and how many characters were replaced for it."""
    # Undecodable bytes arrive as lone surrogates (errors="surrogateescape"), as do JSON's own; genuine U+FFFD do not.
    try:
        raw.encode()
    except UnicodeEncodeError:
        text, replaced = re.subn("[\ud800-\udfff]", _REPLACEMENT, raw)
        return text, replaced
    return raw, 0


def _records(file: CorpusFile) -> Iterator[tuple[int, str, str | None]]:
    """(place in the file, text, language or None) of each record; the place is a byte offset or a row number."""
    name = file.path.name
    if name.endswith(".txt"):
        yield 0, file.path.read_bytes().decode("utf-8-sig", errors="surrogateescape"), None
    elif name.endswith((".parquet", ".arrow")):
        yield from _table_records(file.path)
    else:
        yield from _jsonl_records(file.path)


def _jsonl_records(path: Path) -> Iterator[tuple[int, str, str | None]]:
    offset, column = 0, None
    with _open_lines(path) as lines:
        try:
            for number, line in enumerate(lines, start=1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                record = _parse_line(path, number, line)
                column = column or _text_column(path, list(record))
                text = record.get(column)
                if text is not None and not isinstance(text, str):
                    raise DataError(f"{path}, line {number}: '{column}' is a {type(text).__name__}, not text.")
                language = next((record[name] for name in LANGUAGE_COLUMNS if record.get(name)), None)
                yield start, text or "", str(language) if language else None
        except (EOFError, gzip.BadGzipFile) as error:
            raise DataError(f"{path} is damaged or cut off: {error}. Fetch or make the file again.") from error


def _parse_line(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number} is not JSON ({error.msg}): {line[:80]!r}. A .jsonl file holds one JSON object a "
            f"line; mend or remove the line."
        ) from error
    if not isinstance(record, dict):
        raise DataError(f"{path}, line {number} is a JSON {type(record).__name__}; each line must be an object.")
    return record


def _open_lines(path: Path) -> IO[bytes] | gzip.GzipFile:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.name.endswith(".zst"):
        try:
            zstandard = importlib.import_module("zstandard")
        except ImportError as error:
            raise DataError(f"{path} needs the zstandard package: `pip install zstandard`, or unpack it.") from error
        return io.BufferedReader(zstandard.open(path, "rb"))
    return open(path, "rb")


def _text_column(path: Path, columns: list[str]) -> str:
    found = next((name for name in TEXT_COLUMNS if name in columns), None)
    if found is None:
        raise DataError(
            f"{path} has no text column: it has {columns}, and looked for were {list(TEXT_COLUMNS)}. Rename the column "
            f"that holds the text to 'text'."
        )
    return found


def _table_records(path: Path) -> Iterator[tuple[int, str, str | None]]:
    row = 0
    try:
        for batch in _table_batches(path):
            names = list(batch.schema.names)
            texts = batch.column(names.index(_text_column(path, names)))
            if not (pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type)):
                raise DataError(f"{path}: the text column has type {texts.type}, not string.")
            language = next((name for name in LANGUAGE_COLUMNS if name in names), None)
            languages = batch.column(names.index(language)).to_pylist() if language else [None] * len(texts)
            for text, tag in zip(texts.to_pylist(), languages, strict=True):
                yield row, text or "", str(tag) if tag else None
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a table ({error}). Fetch or make the file again.") from error


def _table_batches(path: Path) -> Iterator[pa.RecordBatch]:
    """Record batches of a parquet or Arrow file, with only the columns that matter where the format allows it."""
    if path.name.endswith(".parquet"):
        with pq.ParquetFile(path) as table:
            names = table.schema_arrow.names
            wanted = [_text_column(path, names), *(name for name in LANGUAGE_COLUMNS if name in names)]
            yield from table.iter_batches(batch_size=_TABLE_ROWS, columns=wanted)
        return
    with pa.OSFile(str(path)) as file:
        try:
            reader = pa.ipc.open_file(file)
        except pa.ArrowInvalid:
            # Hugging Face writes the stream format under the same suffix.
            file.seek(0)
            yield from pa.ipc.open_stream(file)
        else:
            for index in range(reader.num_record_batches):
                yield reader.get_batch(index)
