"""How well a tokenizer fits the text: figures, pictures, and the same of other tokenizers beside it.

    report.json         all of it
    bytes_per_token.png, tokens_per_word.png   by language, of each tokenizer
    sources.png         both by source
    token_lengths.png   how long the entries are, and how long those that are used
    usage.png           how often each entry is used

Everything is measured on one sample of at most 2,000 documents a source and language.
"""

from __future__ import annotations

import random
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.corpora import Document
from rxt_dist.data.rows import SPECIAL_COUNT
from rxt_dist.errors import DataError
from rxt_dist.files import write_json_atomic

REPORT_FILE = "report.json"

_DOCUMENTS, _DOCUMENT_CHARACTERS = 2000, 20_000
_BATCH = 64
_LONGEST = 32
_EXAMPLES = 30
_SPEED_BYTES = 1 << 19
_RUN = 64  # code points that are encoded together
_PRIVATE_STEP, _UNASSIGNED_STEP = 16, 64

# (source, language) -> texts
Texts = Mapping[tuple[str, str], list[str]]


@dataclass(frozen=True)
class LanguageReport:
    """How a tokenizer fits one language or source."""

    language: str
    documents: int
    tokens: int
    words: int
    text_bytes: int
    round_trip_failures: int

    def to_dict(self) -> dict[str, Any]:
        """The counts, with `tokens_per_word` (fertility) and `bytes_per_token` (compression)."""
        ratios = {
            "tokens_per_word": self.tokens / max(self.words, 1),
            "bytes_per_token": self.text_bytes / max(self.tokens, 1),
        }
        return asdict(self) | {name: round(value, 3) for name, value in ratios.items()}


def gather(documents: Iterable[Document]) -> dict[tuple[str, str], list[str]]:
    """The sample: of each source and language up to 2,000 documents, each with the same chance, cut at 20,000
    characters. The same documents give the same sample."""
    texts: dict[tuple[str, str], list[str]] = {}
    seen = Counter[tuple[str, str]]()
    chance = random.Random(0)
    for document in documents:
        key = (document.source, document.language)
        kept = texts.setdefault(key, [])
        # Reservoir sampling: the n-th document takes the place of another with chance 2,000 in n.
        place = seen[key] if len(kept) < _DOCUMENTS else chance.randrange(seen[key] + 1)
        seen[key] += 1
        if place < _DOCUMENTS:
            kept[place : place + 1] = [document.text[:_DOCUMENT_CHARACTERS]]
    return texts


def fit_report(tokenizer: Tokenizer, texts: Texts, by: int = 1) -> list[LanguageReport]:
    """Fertility, compression and exact round trips per language (`by` 1) or source (`by` 0)."""
    grouped: dict[str, list[str]] = {}
    for key, of_key in texts.items():
        grouped.setdefault(key[by], []).extend(of_key)
    reports = []
    for name in sorted(grouped):
        tokens = failures = 0
        for batch in _batches(grouped[name]):
            for lost, size in _round_trips(tokenizer, batch):
                tokens += size
                failures += lost is not None
        reports.append(
            LanguageReport(
                language=name,
                documents=len(grouped[name]),
                tokens=tokens,
                words=sum(len(text.split()) for text in grouped[name]),
                text_bytes=sum(len(text.encode()) for text in grouped[name]),
                round_trip_failures=failures,
            )
        )
    return reports


def _batches(texts: list[str]) -> Iterator[list[str]]:
    """What is encoded together: an encoding takes some 130 bytes a token, until its ids are taken out."""
    for start in range(0, len(texts), _BATCH):
        yield texts[start : start + _BATCH]


def open_other(path: Path) -> Tokenizer:
    """A tokenizer.json to compare with; nothing is asked of it but that it can be opened.

    Raises:
        DataError: it cannot.
    """
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path} cannot be compared with: it is not a tokenizer.json ({error}).") from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_report(tokenizer: Tokenizer, texts: Texts, others: Mapping[str, Tokenizer]) -> dict[str, Any]:
    """All figures, as plain values for JSON.

    Raises:
        DataError: there are no texts.
    """
    if not any(texts.values()):
        raise DataError("There is no text to measure the tokenizer on: every document is empty or was skipped.")
    flat = [text for of_key in texts.values() for text in of_key]
    counts = _counts(tokenizer, flat)
    lengths = token_bytes(tokenizer)
    ordinary = np.arange(len(lengths)) >= SPECIAL_COUNT
    unused, single = (np.flatnonzero(ordinary & (counts == times)) for times in (0, 1))
    return {
        **fit_figures(tokenizer, texts),
        "sources": {report.language: report.to_dict() for report in fit_report(tokenizer, texts, by=0)},
        "sample": {"documents": len(flat), "bytes": sum(len(text.encode()) for text in flat)},
        "usage": {
            "tokens": int(counts.sum()),
            "unused": len(unused),
            "single_use": len(single),
            "unused_examples": _spelled(tokenizer, unused),
            "single_use_examples": _spelled(tokenizer, single),
            "counts_by_rank": _thinned(np.sort(counts)[::-1]),
        },
        "token_lengths": {
            "bytes": list(range(1, _LONGEST + 1)),
            "entries": _histogram(lengths[ordinary], None),
            "occurrences": _histogram(lengths[ordinary], counts[ordinary]),
        },
        "planes": planes(tokenizer),
        "surrogates": "Lone surrogates are no text: UTF-8 cannot hold them, and reading replaces each with U+FFFD.",
        "compared": {name: fit_figures(other, texts) for name, other in others.items()},
    }


def fit_figures(tokenizer: Tokenizer, texts: Texts) -> dict[str, Any]:
    """What is compared between tokenizers: the fit to each language, and the speed."""
    flat = [text for of_key in texts.values() for text in of_key]
    return {
        "vocab_size": tokenizer.get_vocab_size(),
        "languages": {report.language: report.to_dict() for report in fit_report(tokenizer, texts)},
        "speed": encode_speed(tokenizer, flat),
    }


def encode_speed(tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Encoding with the `tokenizers` library, one text after another on one core, over half a MB of the texts."""
    size, tokens, started = 0, 0, time.perf_counter()
    for text in texts:
        tokens += len(tokenizer.encode(text, add_special_tokens=False).ids)
        size += len(text.encode())
        if size >= _SPEED_BYTES:
            break
    seconds = time.perf_counter() - started
    return {
        "megabytes_per_second": round(size / seconds / 1e6, 3),
        "megatokens_per_second": round(tokens / seconds / 1e6, 3),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Entries
# ---------------------------------------------------------------------------------------------------------------------


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Length in bytes of each entry of a byte-level tokenizer (one character of an entry is one byte)."""
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = len(token)
    return lengths


def _counts(tokenizer: Tokenizer, texts: list[str]) -> npt.NDArray[np.int64]:
    """How often each id occurs in the texts."""
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, dtype=np.int64)
    for batch in _batches(texts):
        for item in tokenizer.encode_batch(batch, add_special_tokens=False):
            counts += np.bincount(item.ids, minlength=len(counts))
    return counts


def _spelled(tokenizer: Tokenizer, ids: npt.NDArray[np.int64]) -> list[str]:
    """Some of these entries, evenly spaced, as text (half a character is shown as U+FFFD)."""
    chosen = ids[:: max(len(ids) // _EXAMPLES, 1)][:_EXAMPLES]
    return [tokenizer.decode([index], skip_special_tokens=False) for index in chosen.tolist()]


def _thinned(counts: npt.NDArray[np.int64]) -> list[list[int]]:
    """[rank, count] at up to a hundred ranks, evenly spaced on a logarithmic scale."""
    used = counts[counts > 0]
    ranks = np.unique(np.geomspace(1, max(len(used), 1), 100).astype(int))
    return [[int(rank), int(used[rank - 1])] for rank in ranks if rank <= len(used)]


def _histogram(lengths: npt.NDArray[np.int64], weights: npt.NDArray[np.int64] | None) -> list[int]:
    """Sum of the weights (or the number) of entries of 1 to 32 bytes; longer ones count as 32."""
    counted = np.bincount(np.minimum(lengths, _LONGEST), weights, minlength=_LONGEST + 1)
    return [int(value) for value in counted[1:]]


# ---------------------------------------------------------------------------------------------------------------------
# Unicode
# ---------------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=17)
def code_points(plane: int) -> tuple[int, ...]:
    """What is tried of a plane of Unicode: every assigned code point, every 16th of private use and every 64th that is
    not assigned (a later Unicode may). Surrogates are none: they stand for no character."""
    chosen = []
    for code in range(plane << 16, (plane + 1) << 16):
        category = unicodedata.category(chr(code))
        step = {"Cs": 0, "Co": _PRIVATE_STEP, "Cn": _UNASSIGNED_STEP}.get(category, 1)
        if step and code % step == 0:
            chosen.append(code)
    return tuple(chosen)


def planes(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """For each plane of Unicode how many code points were tried, and how many did not come back exactly."""
    results = []
    for plane in range(17):
        tried = code_points(plane)
        failed, tokens = [], 0
        for text, size in _round_trips(tokenizer, ["".join(map(chr, run)) for run in _runs(tried)]):
            tokens += size
            if text is not None:
                failed += [ord(one) for one, _ in _round_trips(tokenizer, list(text)) if one is not None]
        results.append(
            {
                "plane": plane,
                "code_points": len(tried),
                "tokens_per_code_point": round(tokens / max(len(tried), 1), 3),
                "failures": len(failed),
                "first_failures": [f"U+{code:04X}" for code in failed[:10]],
            }
        )
    return results


def _runs(codes: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(codes), _RUN):
        yield codes[start : start + _RUN]


def _round_trips(tokenizer: Tokenizer, texts: list[str]) -> Iterator[tuple[str | None, int]]:
    """For each text the text if it did not come back, else None, and its number of tokens."""
    encoded = [item.ids for item in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    decoded = tokenizer.decode_batch(encoded, skip_special_tokens=False)
    for text, ids, back in zip(texts, encoded, decoded, strict=True):
        yield None if text == back else text, len(ids)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write_report(report: dict[str, Any], name: str, folder: Path) -> list[str]:
    """Write report.json and the pictures, and return their names. `name` stands for the tokenizer in the pictures."""
    from data_prep.tokenizing.plots import draw_report

    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / REPORT_FILE, {"tokenizer": name} | report)
    return [REPORT_FILE, *(path.name for path in draw_report(report, name, folder))]
