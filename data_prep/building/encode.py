"""What turns text into ids: the reference library, or a faster one that has proved equal to it.

A backend gives the ids of plain text: nothing in it is a control token, and no special id is added. `gigatoken` is some
twenty times as fast as `tokenizers`, and young; it is used only after it has given the same ids on a probe of texts and
on documents of the corpus. Since both give the same ids, the choice is no part of what a dataset is.
"""

from __future__ import annotations

import json
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from data_prep.building.memory import resident_bytes
from rxt_dist.data.rows import MAX_VOCABULARY, SPECIAL_TOKENS
from rxt_dist.errors import DataError

BACKENDS = ("tokenizers", "gigatoken")

_CHUNK_CHARACTERS = 1 << 20
# An encoding of `tokenizers` takes some 130 bytes a token until its ids are taken out.
_BATCH_CHARACTERS = 1 << 20
_FORGET_CHARACTERS, _FORGET_BYTES = 1 << 22, 256 << 20
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])[ \n.,。、](?=[^\W\d_])")


class Backend(Protocol):
    """Encodes plain text."""

    name: str

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        """The ids of each text, uint16 [n]. The arrays may be views of one common array."""
        ...


class TokenizersBackend:
    """The reference. `threads` lets the library use all cores of the machine."""

    name = "tokenizers"

    def __init__(self, file: Path, threads: bool = False) -> None:
        import os

        from data_prep.tokenizing.tokenizer import load_tokenizer

        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads else "false"
        self._tokenizer = load_tokenizer(file)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        parts: list[list[npt.NDArray[np.uint16]]] = [[] for _ in texts]
        for batch in _batches(texts):
            encoded = self._tokenizer.encode_batch_fast([piece for _, piece in batch], add_special_tokens=False)
            for (text, _), item in zip(batch, encoded, strict=True):
                parts[text].append(np.array(item.ids, dtype=np.uint16))
        return [of_text[0] if len(of_text) == 1 else np.concatenate(of_text) for of_text in parts]


class GigatokenBackend:
    """The fast one, single-threaded.

    It remembers every word it has met, for ever: natural text takes some 100 MB, random strings 5 bytes a byte of text.
    So it is loaded anew (a quarter of a second) when this process has grown too much.
    """

    name = "gigatoken"

    def __init__(self, file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        # It would read a literal "[T]" as the control token; without the entry the text has no other reading than
        # its characters. Entries that are not special are ordinary words, for the reference too.
        content["added_tokens"] = [item for item in content.get("added_tokens") or [] if not item["special"]]
        self._json = json.dumps(content | {"truncation": None, "padding": None})
        self._load()

    def _load(self) -> None:
        import gigatoken

        self._encode: Callable[[str], npt.NDArray[np.uint32]] | None = None  # the old one goes before the new one comes
        self._encode = gigatoken.Tokenizer.from_json(self._json).backend.encode
        self._resident, self._characters = resident_bytes(), 0

    def _ids(self, text: str) -> npt.NDArray[np.uint32]:
        self._characters += len(text)
        if self._characters >= _FORGET_CHARACTERS:  # not at each text: what has grown may be something else
            self._characters = 0
            if resident_bytes() - self._resident > _FORGET_BYTES:
                self._load()
        assert self._encode is not None
        return self._encode(text)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        if not texts:
            return []
        rows = [self._ids(text) if len(text) <= _CHUNK_CHARACTERS else self._encode_long(text) for text in texts]
        narrow = _narrow(np.concatenate(rows))
        ends = np.cumsum([len(row) for row in rows]).tolist()
        return [narrow[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _encode_long(self, text: str) -> npt.NDArray[np.uint16]:
        return np.concatenate([_narrow(self._ids(piece)) for piece in chunks(text)])


def _narrow(ids: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    assert int(ids.max(initial=0)) < MAX_VOCABULARY, "gigatoken gave an id that 16 bits cannot hold"
    return ids.astype(np.uint16, copy=False)


def chunks(text: str) -> Iterator[str]:
    """Cut a very long text between two words, before the blank or mark that parts them: no token of a byte-level BPE
    spans that place, so the ids are those of the whole, and the memory of the tokenizer stays bounded."""
    start = 0
    while len(text) - start > _CHUNK_CHARACTERS:
        found = _BETWEEN_WORDS.search(text, start + _CHUNK_CHARACTERS)
        if found is None:
            break
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def _batches(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """(index of the text, piece of it) in lists of about a million characters."""
    batch: list[tuple[int, str]] = []
    size = 0
    for index, text in enumerate(texts):
        for piece in chunks(text):
            batch.append((index, piece))
            size += len(piece)
            if size >= _BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """A backend's name, and a sentence that says why it is this one."""

    name: str
    reason: str


def open_backend(name: str, file: Path, threads: bool = False) -> Backend:
    """The backend of this name for a tokenizer.json that has been checked."""
    return GigatokenBackend(file) if name == "gigatoken" else TokenizersBackend(file, threads)


def choose_backend(wanted: str, file: Path, documents: Sequence[str]) -> Choice:
    """Settle "auto", "tokenizers" or "gigatoken"; the fast one only if its ids of the probe and `documents` are equal.

    Raises:
        DataError: "gigatoken" was asked for by name and is not installed, or differs.
    """
    if wanted == "tokenizers":
        return Choice("tokenizers", "Encoding with tokenizers, as asked for.")
    difference = _reason_against_gigatoken(file, documents)
    if difference is None:
        texts = len(probe_texts()) + len(documents)
        return Choice("gigatoken", f"Encoding with gigatoken: its ids are those of tokenizers on {texts:,} texts.")
    if wanted == "gigatoken":
        raise DataError(f"The backend gigatoken cannot be used: {difference}. Take --backend tokenizers, or auto.")
    return Choice("tokenizers", f"Encoding with tokenizers: {difference}.")


def _reason_against_gigatoken(file: Path, documents: Sequence[str]) -> str | None:
    try:
        fast = GigatokenBackend(file)
    except ImportError:
        return "gigatoken is not installed (`pip install gigatoken==0.10.0` encodes about twenty times faster)"
    except Exception as error:  # a young library: whatever it cannot load is no reason to end a build
        return f"gigatoken cannot load this tokenizer ({error})"
    return first_difference(TokenizersBackend(file), fast, [*probe_texts(), *documents])


def first_difference(reference: Backend, fast: Backend, texts: Sequence[str]) -> str | None:
    """What is unequal, for the first text whose ids differ; None when all are equal."""
    for start in range(0, len(texts), 256):
        part = texts[start : start + 256]
        try:
            found = fast.encode(part)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            return f"gigatoken fails on a probe ({error})"
        for text, expected, ids in zip(part, reference.encode(part), found, strict=True):
            if not np.array_equal(expected, ids):
                at = next((i for i, (a, b) in enumerate(zip(expected, ids, strict=False)) if a != b), len(ids))
                return f"gigatoken gives other ids than tokenizers for {text[:40]!r}, from token {at} on"
    return None


@cache
def probe_texts() -> tuple[str, ...]:
    """Some ten thousand fixed texts: every plane of Unicode, control-token literals, white space, digits, contractions,
    mixed scripts, and strings from random bytes."""
    rng = random.Random(0)
    texts = [*_planes(), *_literals(), *_white_space()]
    texts += [digit * count for digit in ("7", "٣", "９", "½", "𝟘") for count in (*range(1, 12), 100, 1000)]
    texts += [f"{word}{suffix}" for word in ("I", "we", "ŁÓDŹ", " x", "9") for suffix in _CONTRACTIONS]
    pieces = [*_PIECES, *SPECIAL_TOKENS]
    texts += ["".join(rng.choice(pieces) for _ in range(rng.randint(1, 30))) for _ in range(3000)]
    texts += [rng.randbytes(rng.randint(1, 60)).decode("utf-8", errors="replace") for _ in range(1500)]
    texts += [rng.randbytes(rng.randint(1, 60)).decode("latin-1") for _ in range(1500)]
    texts += ["a" * 3000, "ż" * 3000, "漢" * 3000, "".join(rng.choices("abcdefgh", k=3000)), "=-" * 1500, "\n" * 3000]
    return tuple(texts)


_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "'LL", "’s", "'", "''s", "'sx")
_PIECES = (
    "the", " of", "żółć", "Ω", "漢字", "かな", "한글", "हिन्दी", "ру", "عربي", "🦊", "👩‍👩‍👧", "e\u0301",
    "\u00ad", "\ufeff", " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u200b", "\u2028", "1", "42", "٣", "3.14",
    "[", "]", "_", "'",
    ".", ",", "...", "—", "\\", "\x00", "\x7f", "\ufffd", "A", "ſ", "İ", "ﬁ",
)  # fmt: skip


def _planes() -> Iterator[str]:
    """Characters in runs of 64, joined and apart: every one of the first plane, every 61st of the others."""
    for plane in range(17):
        points = range(plane << 16, (plane + 1) << 16, 1 if plane == 0 else 61)
        characters = [chr(point) for point in points if not 0xD800 <= point <= 0xDFFF]
        for start in range(0, len(characters), 64):
            run = characters[start : start + 64]
            yield "".join(run)
            yield "a " + " ".join(run[::8]) + "1"


def _literals() -> Iterator[str]:
    frames = ("{}", "List{}", "x {} y", "{}{}", " {}", "{}\n", "[{}]", "é{}1", "{} ")
    for token in SPECIAL_TOKENS:
        yield from (frame.format(token, token) for frame in frames)
        yield from (token[:-1], token[1:], token.lower(), " ".join(token))


def _white_space() -> Iterator[str]:
    blanks = [chr(p) for p in range(sys.maxunicode + 1) if chr(p).isspace() or unicodedata.category(chr(p)) == "Zs"]
    for blank in blanks:
        yield from (f"a{blank}b", blank, f"{blank}{blank}a", f"a {blank} 1", f" {blank}\n{blank}.")
    for count in (*range(1, 20), 40, 200, 1000):
        yield from (" " * count + "x", "x" + " " * count, "x" + "\n" * count + "x", "\t" * count + "x", " \n" * count)
