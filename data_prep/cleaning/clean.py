"""Which documents are worth training on: normalisation, then filters, each off unless the configuration asks for it.

The order is fixed, cheap before dear, and the first filter that a document fails names the reason:

    (normalise) -> too_short -> too_long -> few_letters -> repeated_lines -> repeated_ngrams -> wrong_language
                -> exact_duplicate -> near_duplicate

Duplicates are found beforehand over the whole corpus (duplicates.py); here they are only counted. What a filter
measures is said at its function. The measures are those of the MassiveText filters (Rae et al. 2021, appendix A1),
which look at the form of a text and so treat English and Polish alike; only `wrong_language` knows words. They read
the first million characters of a text.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.cleaning.shingles import hash_shingles, hash_words
from data_prep.corpora import Document
from rxt_dist.config.clean import CleanConfig

EXACT_DUPLICATE, NEAR_DUPLICATE = "exact_duplicate", "near_duplicate"
REASONS = (
    "too_short",
    "too_long",
    "few_letters",
    "repeated_lines",
    "repeated_ngrams",
    "wrong_language",
    EXACT_DUPLICATE,
    NEAR_DUPLICATE,
)
NGRAM_WORDS = 10
KEPT = "kept"

# Repetition and letters are measured on this much of a text, so that memory stays bounded.
_MEASURED_CHARACTERS = 1_000_000
_SAMPLES, _SAMPLE_CHARACTERS = 3, 300
_LANGUAGE_CHARACTERS = 2000
_MIN_FOREIGN_WORDS, _FOREIGN_TO_OWN = 6, 4


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Frequent words that the other language does not have. Left out are those that both write (to, do, on, was, we, go, by,
# my, pan) and single letters, which stand in formulas. Polish without its accents is Polish too.
_FREQUENT_WORDS = {
    "en": _words(
        "the and of is that it with for as his her they this have from are were she you which be not but had would "
        "there their what about been has will can more when who them these than its could"
    ),
    "pl": _words(
        "się nie jest że był była było dla jak czy jego przez oraz tego już ich aby która który które przy po od są "
        "także również może tylko być jako między sobie gdy kiedy bardzo sie jeszcze tym tej tak też mnie"
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measures of a text
# ---------------------------------------------------------------------------------------------------------------------


def line_repetition(text: str) -> float:
    """Share of the characters that stand in lines which occurred before in the text; blank lines do not count."""
    lines = [line for line in map(str.strip, text[:_MEASURED_CHARACTERS].split("\n")) if line]
    distinct = set(lines)
    if len(distinct) == len(lines):
        return 0.0
    total = sum(map(len, lines))
    return 1 - sum(map(len, distinct)) / total


def ngram_repetition(text: str) -> float:
    """Share of the words that stand in a run of 10 words which began earlier in the text too."""
    words, _ = hash_words([text[:_MEASURED_CHARACTERS]])
    runs = hash_shingles(words, NGRAM_WORDS)
    ordered = np.sort(runs)  # several times faster than with the indices, which few texts need
    if not (ordered[1:] == ordered[:-1]).any():
        return 0.0
    _, first = np.unique(runs, return_index=True)
    again = np.ones(len(runs), dtype=bool)
    again[first] = False
    # +1 where a repeated run begins and -1 behind its end: the running sum is positive inside any of them.
    depth = np.zeros(len(words) + 1, dtype=np.int64)
    depth[:-NGRAM_WORDS] += again
    depth[NGRAM_WORDS:] -= again
    return float((np.cumsum(depth[:-1]) > 0).mean())


def letter_share(text: str) -> float:
    """Share of letters, with the marks on them, among the characters that are not white space."""
    codes = np.frombuffer(text[:_MEASURED_CHARACTERS].encode("utf-32-le"), dtype=np.uint32)
    counts = np.bincount(_kinds()[codes], minlength=3)
    return float(counts[2] / max(counts[1] + counts[2], 1))


@lru_cache(maxsize=1)
def _kinds() -> npt.NDArray[np.uint8]:
    """For each code point 0 for white space, 2 for letters and marks, 1 for all else."""
    kinds = np.ones(0x110000, dtype=np.uint8)
    for code in range(0x40000):  # beyond are only tags, selectors and private use
        character = chr(code)
        if character.isspace():
            kinds[code] = 0
        elif unicodedata.category(character)[0] in "LM":
            kinds[code] = 2
    return kinds


def is_other_language(text: str, language: str) -> bool:
    """Whether a text tagged "en" or "pl" is clearly of the other one of the two.

    Clearly: among its first 2,000 characters stand at least 6 frequent words of the other language, and 4 times as many
    as of its own. A text in both, a list, code and a third language are not.
    """
    if language not in _FREQUENT_WORDS:
        return False
    words = text[:_LANGUAGE_CHARACTERS].lower().split()
    counts = {name: sum(map(known.__contains__, words)) for name, known in _FREQUENT_WORDS.items()}
    own = counts.pop(language)
    (foreign,) = counts.values()
    return foreign >= _MIN_FOREIGN_WORDS and foreign >= _FOREIGN_TO_OWN * own


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class SourceReport:
    """Counts of one source. `characters` and `kept_characters` are after normalisation; `dropped` counts documents by
    reason; `samples` holds the first few documents, cut at 300 characters, by reason and under "kept"."""

    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    normalised: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    samples: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def count(self, document: Document, reason: str | None) -> None:
        """Count one document as kept, or as dropped for `reason`."""
        size = len(document.text)
        self.documents += 1
        self.characters += size
        if reason is None:
            self.kept += 1
            self.kept_characters += size
        else:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
        samples = self.samples.setdefault(reason or KEPT, [])
        if len(samples) < _SAMPLES:
            samples.append({"id": document.id, "text": document.text[:_SAMPLE_CHARACTERS]})

    def add(self, other: SourceReport) -> None:
        """Add what comes after this: samples stay the first ones."""
        for name in ("documents", "characters", "kept", "kept_characters", "normalised"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for reason, count in other.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
        for reason, samples in other.samples.items():
            self.samples[reason] = (self.samples.get(reason, []) + samples)[:_SAMPLES]


@dataclass
class CleanReport:
    """What was kept and dropped, by source. Reports of units are added in the order of the units, so that the samples
    do not depend on which was finished first."""

    sources: dict[str, SourceReport] = field(default_factory=dict)

    def source(self, name: str) -> SourceReport:
        return self.sources.setdefault(name, SourceReport())

    def add(self, other: CleanReport) -> None:
        """Add the report of a later unit; `other` is not changed and shares nothing with this one."""
        for name, report in other.sources.items():
            self.source(name).add(report)

    @property
    def documents(self) -> int:
        return sum(source.documents for source in self.sources.values())

    @property
    def kept(self) -> int:
        return sum(source.kept for source in self.sources.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Documents by reason over all sources, in the order of the filters; reasons that never occurred are left
        out."""
        total = Counter[str]()
        for source in self.sources.values():
            total.update(source.dropped)
        return {reason: total[reason] for reason in REASONS if total[reason]}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the totals, and each source."""
        return {
            "documents": self.documents,
            "kept": self.kept,
            "dropped": self.dropped,
            "sources": {name: _plain(self.sources[name]) for name in sorted(self.sources)},
        }

    @staticmethod
    def from_dict(value: dict[str, Any]) -> CleanReport:
        """The inverse of `to_dict`."""
        return CleanReport({name: SourceReport(**source) for name, source in value["sources"].items()})


def _plain(source: SourceReport) -> dict[str, Any]:
    return vars(source) | {"dropped": dict(source.dropped), "samples": dict(source.samples)}


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning
# ---------------------------------------------------------------------------------------------------------------------


class Cleaner:
    """Applies a configuration to documents and keeps the report of it."""

    def __init__(self, config: CleanConfig) -> None:
        self.report = CleanReport()
        self._form: Literal["NFC", "NFKC"] | None = _FORMS[config.normalise]
        self._filters = filters_of(config)

    def clean(self, document: Document, duplicate: str | None = None) -> Document | str:
        """The document as it is to be tokenised, or the reason why it is dropped.

        Args:
            duplicate: the reason that `duplicates.dropped` gives for this document; the filters come before it.
        """
        report = self.report.source(document.source)
        text = document.text
        if self._form is not None and not unicodedata.is_normalized(self._form, text):
            document = replace(document, text=unicodedata.normalize(self._form, text))
            report.normalised += 1
        reason = next((name for name, fails in self._filters if fails(document)), duplicate)
        report.count(document, reason)
        return document if reason is None else reason


_FORMS: dict[str, Literal["NFC", "NFKC"] | None] = {"none": None, "nfc": "NFC", "nfkc": "NFKC"}

Filter = Callable[[Document], bool]


def filters_of(config: CleanConfig) -> list[tuple[str, Filter]]:
    """The filters that the configuration turns on, in their order: (reason, whether a document fails)."""
    shortest, longest, letters = config.min_characters, config.max_characters, config.min_letters
    lines, ngrams = config.max_line_repetition, config.max_ngram_repetition
    filters: list[tuple[str, Filter]] = []
    if shortest:
        filters.append(("too_short", lambda document: len(document.text) < shortest))
    if longest is not None:
        filters.append(("too_long", lambda document: len(document.text) > longest))
    if letters > 0:
        filters.append(("few_letters", lambda document: letter_share(document.text) < letters))
    if lines < 1:
        filters.append(("repeated_lines", lambda document: line_repetition(document.text) > lines))
    if ngrams < 1:
        filters.append(("repeated_ngrams", lambda document: ngram_repetition(document.text) > ngrams))
    if config.check_language:
        filters.append(("wrong_language", lambda document: is_other_language(document.text, document.language)))
    return filters
