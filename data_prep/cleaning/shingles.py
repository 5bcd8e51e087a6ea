"""Hashes of words and of shingles (runs of neighbouring words), for whole batches of texts at once.

Both filters and near-duplicates compare shingles. Hashing them word by word in Python costs more than tokenising
does, so a batch of texts is one array of bytes: the hash of a word is a polynomial over its bytes modulo 2^64, read off
a running sum in a few numpy operations. The hashes are the same in every process, on every machine and for ever:
duplicates found in one job of an array must be found in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]

# Odd, so that it has an inverse modulo 2^64: a running sum divided by the power where a word begins is that word's own.
_BASE = 0x9E3779B97F4A7C15
_LAST_WHITE = 0x20
_PIECE = 1 << 18  # characters hashed at once


@lru_cache(maxsize=1)
def _byte_values() -> Hashes:
    """A 64-bit value for each byte."""
    return _mixed(np.arange(1, 257, dtype=np.uint64) * np.uint64(_BASE))


@lru_cache(maxsize=1)
def _powers() -> tuple[Hashes, Hashes]:
    """Powers of the base and of its inverse modulo 2^64, as many as the longest piece can have bytes."""
    both = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(4 * _PIECE + 2, base, dtype=np.uint64)
        factors[0] = 1
        both.append(np.cumprod(factors))
    return both[0], both[1]


def _mixed(values: Hashes) -> Hashes:
    """splitmix64's finaliser: spreads every bit of the input over all of the output."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_words(texts: Sequence[str]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    """The words of N texts as one array of hashes, and their bounds [N + 1] in it.

    A word is what stands between white space (space, tab, line ends and the other bytes up to 0x20). Memory does not
    grow with the length of a text, beside 8 bytes a word; only a word of over 262,144 characters is cut.
    """
    if sum(len(text) + 1 for text in texts) <= _PIECE:
        return _hash_together(texts)
    parts = [np.concatenate([_hash_together([piece])[0] for piece in _pieces(text)]) for text in texts]
    return np.concatenate(parts), np.cumsum([0, *map(len, parts)])


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start >= _PIECE:
        stop = max(text.rfind(" ", start, start + _PIECE - 1), text.rfind("\n", start, start + _PIECE - 1))
        stop = stop if stop > start else start + _PIECE - 1
        yield text[start:stop]
        start = stop
    yield text[start:]


def _hash_together(texts: Sequence[str]) -> tuple[Hashes, npt.NDArray[np.int64]]:
    data = [text.encode() for text in texts]
    bytes_ = np.frombuffer(b"\n" + b"\n".join(data) + b"\n", dtype=np.uint8)
    white = bytes_ <= _LAST_WHITE
    edges = np.flatnonzero(white[1:] != white[:-1])
    before, last = edges[::2], edges[1::2]  # the white byte before each word, and the word's last byte
    up, down = _powers()
    running = np.cumsum(_byte_values()[bytes_] * up[: len(bytes_)])
    hashes = _mixed((running[last] - running[before]) * down[before])
    ends = np.cumsum([0, *(len(item) + 1 for item in data)])
    return hashes, np.searchsorted(before, ends)


def hash_shingles(words: Hashes, length: int) -> Hashes:
    """Hashes of all runs of `length` neighbouring words; none if there are fewer."""
    if len(words) < length:
        return words[:0]
    if len(words) > _PIECE:
        step = _PIECE - length + 1
        return np.concatenate([hash_shingles(words[at : at + _PIECE], length) for at in range(0, len(words), step)])
    up, down = _powers()
    running = np.zeros(len(words) + 1, dtype=np.uint64)
    np.cumsum(words * up[: len(words)], out=running[1:])
    return _mixed((running[length:] - running[:-length]) * down[: len(words) - length + 1])
