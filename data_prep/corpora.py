"""Documents: files, folders and datasets in, `Document`s out, one at a time.

Formats: .txt (a file is a document), .jsonl, .jsonl.gz, .jsonl.zst (a line is a document), .parquet and .arrow (a row
is a document), folders with any mix of them, and datasets of the Hugging Face `datasets` library. What happens to bad
input, always counted in `ReadCounts`:

- Records without a text (null), and empty or white-space documents, are skipped.
- Documents above the bound on their size are skipped, without being held in memory where the format allows it.
- Invalid UTF-8, NUL characters and lone surrogates of JSON escapes become U+FFFD; a document in which more than 1 % of
  the characters had to be replaced is not text and is skipped.
- A line that is not JSON, a table that cannot be read or has no text column ends the build: it says that the corpus
  is not what its owner believes.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NoReturn

from data_prep.languages import guess_language, language_of_name, language_tag
from data_prep.readers import SUFFIXES, extent, records
from data_prep.readers.base import Input, ReadCounts, Slice, Unit
from rxt_dist.errors import ConfigError, DataError

__all__ = [
    "CorpusFile",
    "Document",
    "ReadCounts",
    "find_files",
    "named_language",
    "read_file",
    "read_slice",
    "read_unit",
    "require_apart",
]

MAX_DOCUMENT_BYTES = 32_000_000
_REPLACEMENT = "\ufffd"
_MAX_REPLACED = 0.01
_DAMAGED = re.compile("[\\0\ud800-\udfff]")
_SUFFIXES_SHOWN = 5

Say = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """One text. `source` names the subset it belongs to (by default its language), `id` is stable across builds."""

    text: str
    language: str
    source: str
    id: str


@dataclass(frozen=True)
class CorpusFile:
    """A file to read: where it is, and `name`, its path from the input's own folder on, which ids and language use.

    `path` is absolute and may be a link: caches link names with suffixes to contents without them.
    """

    path: Path
    name: str


# ---------------------------------------------------------------------------------------------------------------------
# Finding files
# ---------------------------------------------------------------------------------------------------------------------


def find_files(inputs: Iterable[Path | str], say: Say = lambda line: None) -> list[CorpusFile]:
    """All readable files of the inputs (files, folders or globs), each once, sorted by name, hidden ones left out.

    Links are followed. Of several names for one file the first given counts, and files of equal names stay in the
    order of the inputs.

    Args:
        say: told how many files are passed over for their suffix.

    Raises:
        DataError: an input does not exist, cannot be listed, has an unknown format, or holds nothing readable; a link
            leads nowhere; a name is not UTF-8.
    """
    found: dict[str, CorpusFile] = {}
    passed: dict[str, str] = {}
    for given in inputs:
        paths, is_glob = _matches(Path(given))
        readable = 0
        for path in paths:
            is_folder = path.is_dir()
            for file in _below(path) if is_folder else [_alone(path)]:
                if _is_readable(file.path):
                    found.setdefault(os.path.realpath(file.path), _checked(file))
                    readable += 1
                elif is_glob or is_folder:
                    passed[os.path.realpath(file.path)] = _suffix(file.path)
        if not readable:
            is_file = not is_glob and not paths[0].is_dir()
            what = "has a format that cannot be read" if is_file else "holds no file that can be read"
            raise DataError(f"{given} {what}; readable are {', '.join(SUFFIXES)}.")
    unread = [suffix for path, suffix in passed.items() if path not in found]
    if unread:
        kinds = Counter(unread).most_common()
        shown = ", ".join(f"{count:,} {suffix}" for suffix, count in kinds[:_SUFFIXES_SHOWN])
        more = ", ..." if len(kinds) > _SUFFIXES_SHOWN else ""
        say(f"Passing over {len(unread):,} file{'s' * (len(unread) > 1)} of formats that are not read: {shown}{more}")
    return sorted(found.values(), key=lambda file: file.name)


def _matches(given: Path) -> tuple[list[Path], bool]:
    """The path itself, or what it matches as a glob; and whether it is one.

    Raises:
        DataError: nothing is there.
    """
    if os.path.lexists(given):
        _require_target(given)
        return [given], False
    matched = sorted(Path(match) for match in glob.glob(str(given), recursive=True))
    if not matched:
        shown = str(given).encode(errors="backslashreplace").decode()
        raise DataError(f"The input {shown} does not exist. Name files, folders or globs of text.")
    for path in matched:
        _require_target(path)
    return matched, True


def _alone(path: Path) -> CorpusFile:
    # The folder belongs to the name: pl/stories.txt says that it is Polish.
    path = _absolute(path)
    return CorpusFile(path, f"{path.parent.name}/{path.name}")


def _below(root: Path) -> Iterator[CorpusFile]:
    """All files below a folder that are not hidden, whatever their format, in the same order on every machine.

    Raises:
        DataError: a folder cannot be listed, or a link leads nowhere.
    """
    top = _absolute(root)
    for _, folder, files in _walk(top):
        for name in files:
            path = Path(folder, name)
            _require_target(path)
            yield CorpusFile(path, (Path(top.name) / path.relative_to(top)).as_posix())


def _walk(top: Path) -> Iterator[tuple[str, str, list[str]]]:
    """(real path, path, names of the files) of a folder and all below it, without what is hidden.

    Raises:
        DataError: a folder cannot be listed.
    """
    seen = {os.path.realpath(top)}
    for folder, folders, files in os.walk(top, onerror=_refuse_folder, followlinks=True):
        # A folder that was seen under another name has nothing new; a link to a folder above would never end.
        fresh = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(folder, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                fresh.append(name)
        folders[:] = fresh
        yield os.path.realpath(folder), folder, sorted(name for name in files if not name.startswith("."))


def require_apart(out: Path, inputs: Iterable[Path | str]) -> None:
    """Refuse a folder to write to that is or lies in a folder of the inputs, by whatever links or globs: what is
    written there would be read as text by the next run.

    Raises:
        ConfigError: it does, or will once it is there.
        DataError: an input does not exist or cannot be listed.
    """
    real = Path(os.path.realpath(out))
    # Of a folder that is read, what is hidden below it is not.
    around = {str(folder) for folder in (real, *real.parents) if not _is_hidden(real.relative_to(folder).parts)}
    for given in inputs:
        paths, is_glob = _matches(Path(given))
        folders = (folder for path in paths if path.is_dir() for folder, _, _ in _walk(path))
        if any(folder in around for folder in folders) or (is_glob and _will_match(Path(given), real)):
            raise ConfigError(
                f"{out} lies within the input {given}: what is written there would be read as text by the next run. "
                f"Name a folder beside the texts; one that was built already can be moved there."
            )


def _will_match(pattern: Path, folder: Path) -> bool:
    """Whether a glob finds the folder, or one above it, once the folder is there."""
    parts = _absolute(pattern).parts
    literal = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(os.path.realpath(Path(*parts[:literal])))
    if not folder.is_relative_to(root):
        return False
    below = folder.relative_to(root).parts
    return any(
        _matches_parts(below[:end], parts[literal:]) and not _is_hidden(below[end:]) for end in range(len(below) + 1)
    )


def _is_hidden(names: tuple[str, ...]) -> bool:
    return any(name.startswith(".") for name in names)


def _matches_parts(names: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    """Whether names of nested folders match patterns as those of a glob do."""
    if not names or not patterns:
        return all(pattern == "**" for pattern in patterns) and not names
    is_hidden = names[0].startswith(".")
    if patterns[0] == "**":
        return _matches_parts(names, patterns[1:]) or (not is_hidden and _matches_parts(names[1:], patterns))
    if is_hidden and not patterns[0].startswith("."):
        return False
    return fnmatchcase(names[0], patterns[0]) and _matches_parts(names[1:], patterns[1:])


def _absolute(path: Path) -> Path:
    """An absolute path that keeps the names of links, and has no `..`, which links would make ambiguous."""
    if ".." not in path.parts:
        return path.absolute()
    return path.resolve() if path.name == ".." else path.parent.resolve() / path.name


def _is_readable(path: Path) -> bool:
    return path.name.lower().endswith(SUFFIXES) and path.is_file()


def _suffix(path: Path) -> str:
    suffix = path.suffix.encode(errors="replace").decode()
    return suffix if len(suffix) <= 16 and suffix else "without suffix"


def _checked(file: CorpusFile) -> CorpusFile:
    try:
        str(file.path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"The name of {str(file.path)!r} is not UTF-8, so no plan can hold it; rename it.") from error
    return file


def _require_target(path: Path) -> None:
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise DataError(f"{str(path)!r} is a link to nothing. Mend the link, or remove it.") from error
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror}. Mend it, or leave it out.") from error


def _refuse_folder(error: OSError) -> NoReturn:
    raise DataError(
        f"The folder {str(error.filename)!r} cannot be listed: {error.strerror}. Mend its rights, or leave it out."
    ) from error


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_unit(unit: Unit, counts: ReadCounts) -> Iterator[Document]:
    """The documents of a unit, in order; a document's ordinal in the unit is its number in this stream.

    `counts` is added to while reading.

    Raises:
        DataError: an input is damaged or not what its suffix says.
    """
    for part in unit.slices:
        yield from read_slice(part, counts)


def read_file(file: CorpusFile, counts: ReadCounts) -> Iterator[Document]:
    """The documents of one file, in order; `counts` is added to while reading.

    Raises:
        DataError: the file is damaged, not what its suffix says, or has no text column.
    """
    found = extent(Input(file.name, str(file.path), MAX_DOCUMENT_BYTES, bytes=file.path.stat().st_size))
    for part in found.pieces(max(found.text_bytes, 1)):
        yield from read_slice(part, counts)


def read_slice(part: Slice, counts: ReadCounts, choose: Callable[[], bool] | None = None) -> Iterator[Document]:
    """The documents of one slice, or those of them that `choose` takes, asked for each; `counts` is of all.

    Otherwise as `read_unit`.
    """
    item = part.input
    prefix = f"{item.source}/{item.name}" if item.source else item.name
    named = named_language(item)
    for record in records(part):
        if record.too_large:
            counts.too_large += 1
            continue
        if record.text is None:
            counts.null_text += 1
            continue
        text, replaced = _mend(record.text, record.valid)
        if not text or text.isspace():
            counts.empty += 1
            continue
        if _exceeds(text, item.max_document_bytes):
            counts.too_large += 1
            continue
        if replaced > _MAX_REPLACED * len(text):
            counts.not_text += 1
            counts.name_not_text(prefix)
            continue
        counts.repaired_utf8 += replaced > 0
        counts.documents += 1
        if choose is not None and not choose():
            continue
        tag = language_tag(record.language) if record.language and not item.language else named
        if tag is None:
            tag = guess_language(text)
            counts.guessed[tag] = counts.guessed.get(tag, 0) + 1
        yield Document(text, tag, item.source or tag, f"{prefix}#{record.place}")


def named_language(item: Input) -> str | None:
    """The language that the source states or else the names say, of all that records do not tag.

    Of a dataset these are its folder, configuration and split, and its data files where all of them say the same: a
    record does not tell which file it is from. Folders above a dataset say as little of it as those above a file.
    """
    if item.language:
        return language_tag(item.language)
    if item.hub is None:
        return language_of_name(item.name)
    place = "/".join([Path(item.path).name, item.hub.config or "", item.hub.split.partition("[")[0], ""])
    named = {language_of_name(place + file) for file in item.hub.data_files or ("",)}
    return named.pop() if len(named) == 1 else None


def _exceeds(text: str, max_bytes: int) -> bool:
    """Whether the text takes more bytes of UTF-8; a character takes one to four."""
    if len(text) > max_bytes or 4 * len(text) <= max_bytes or text.isascii():
        return len(text) > max_bytes
    return len(text.encode()) > max_bytes


def _mend(raw: str, valid: bool) -> tuple[str, int]:
    """Text that UTF-8 can hold, without NUL, and how many characters were replaced for it."""
    # Undecodable bytes arrive as lone surrogates (errors="surrogateescape"), as do JSON's own; genuine U+FFFD do not.
    if "\0" not in raw and (valid or raw.isascii() or _is_encodable(raw)):
        return raw, 0
    return _DAMAGED.subn(_REPLACEMENT, raw)


def _is_encodable(raw: str) -> bool:
    try:
        raw.encode()
    except UnicodeEncodeError:
        return False
    return True
