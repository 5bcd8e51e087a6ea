"""Which text a tokenizer is trained on: so much of each language or source, from all over the corpus.

Merges are decided by counts, so a share of the sample is a say in the vocabulary. Each group (a language or a source)
may give as much text as its weight says, beside the one of the largest weight; what is given is taken from evenly
spaced places, a little from each, since the first file of a corpus is rarely like the rest. Neither needs more of the
corpus to be read than is trained on, nor to be held in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from data_prep.corpora import Document, ReadCounts, read_slice
from data_prep.languages import language_of_name
from data_prep.readers.base import Slice
from data_prep.units import Unit
from rxt_dist.errors import ConfigError, DataError, nearest

# 64 MB of text a language decides the merges of a large vocabulary; more only costs time and memory.
SAMPLE_BYTES = 64 << 20

_PLACES = 64
_MIN_PLACE_BYTES = 1 << 20
# Where only the text itself says which language it is, this many groups may be mixed in it.
_UNKNOWN_GROUPS = 8


@dataclass
class TrainingSample:
    """How much text of each group is taken, and how much has been.

    `weights` empty: every group that occurs weighs the same. Otherwise groups that are not named are left out. The
    largest weight stands for `max_bytes` of text.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    by: Literal["language", "source"] = "language"
    max_bytes: int = SAMPLE_BYTES
    taken: dict[str, int] = field(default_factory=dict)

    def budget(self, group: str) -> int:
        """Bytes of text that the group may give."""
        if not self.weights:
            return self.max_bytes
        return int(self.max_bytes * self.weights.get(group, 0) / max(self.weights.values()))

    def take(self, documents: Iterable[Document]) -> Iterator[str]:
        """Texts until each group has given its share; ends early once all named groups have."""
        open_groups = {group for group in self.weights if self.budget(group)}
        for document in documents:
            group = getattr(document, self.by)
            left = self.budget(group) - self.taken.get(group, 0)
            if left <= 0:
                continue
            # Cut where the share ends: one very long document must not outweigh it.
            data = document.text.encode()[:left]
            self.taken[group] = self.taken.get(group, 0) + len(data)
            yield data.decode(errors="ignore")
            if len(data) == left:
                open_groups.discard(group)
                if self.weights and not open_groups:
                    return

    def require_all(self) -> None:
        """Raise DataError if a group that has a weight gave no text."""
        empty = [group for group in self.weights if self.budget(group) and not self.taken.get(group)]
        if empty:
            raise DataError(
                f"--weight names the {self.by} {', '.join(empty)}, but no text of it was found; there was "
                f"{', '.join(sorted(self.taken)) or 'none at all'}. Correct the name, or give texts of it."
            )


def parse_weights(
    given: Iterable[str], sources: Iterable[str]
) -> tuple[dict[str, float], Literal["language", "source"]]:
    """Weights from `NAME=NUMBER` strings, and what they name: sources, if all of them are among `sources`.

    Raises:
        ConfigError: not of that form, not positive, given twice, or languages mixed with sources.
    """
    weights: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = -1.0
        if not name or not 0 < weight < float("inf"):
            raise ConfigError(f"--weight is '{item}'; it must be a name and a positive number, such as pl=0.3.")
        if name in weights:
            raise ConfigError(f"--weight names {name} twice.")
        weights[name] = weight
    known = set(sources)
    named = weights.keys() & known
    if named and named != weights.keys():
        wrong = sorted(weights.keys() - known)[0]
        raise ConfigError(
            f"--weight names sources ({', '.join(sorted(named))}) and {wrong}, which is none.{nearest(wrong, known)} "
            f"Weigh either sources or languages."
        )
    return weights, "source" if named else "language"


# ---------------------------------------------------------------------------------------------------------------------
# From all over the corpus
# ---------------------------------------------------------------------------------------------------------------------


def spread_documents(units: Iterable[Unit], sample: TrainingSample, counts: ReadCounts) -> Iterator[Document]:
    """Documents of all sources in turn, as many as `sample` can use, from up to 64 or more places of each.

    Raises:
        DataError: an input that cannot be read.
    """
    slices: dict[tuple[str, str], list[Slice]] = {}
    for unit in units:
        for part in unit.slices:
            language = part.input.language or language_of_name(part.input.name) or ""
            slices.setdefault((part.input.source or "", language), []).append(part)
    streams: dict[tuple[str, str], Iterator[Document]] = {}
    for (source, language), parts in slices.items():
        # A file's name is a guess that its records may correct; only a configured language is certain.
        wanted = _wanted(sample, source, parts[0].input.language or "")
        if wanted:
            streams[source, language] = _spread(parts, wanted, counts)
    given = dict.fromkeys(streams, 0)
    while streams:
        # The one that has given least is next: so the groups run side by side, and none waits for another's end.
        key = min(streams, key=lambda key: given[key])
        document = next(streams[key], None)
        if document is None:
            del streams[key], given[key]
        else:
            given[key] += len(document.text)
            yield document


def _wanted(sample: TrainingSample, source: str, language: str) -> int:
    """Bytes to read of one source and language; "" is not known before reading."""
    group = source if sample.by == "source" else language
    if group:
        return sample.budget(group)
    return _UNKNOWN_GROUPS * sample.max_bytes


def _spread(parts: list[Slice], wanted: int, counts: ReadCounts) -> Iterator[Document]:
    for part, most in choose_places([part.text_bytes for part in parts], wanted):
        size = 0
        for document in read_slice(parts[part], counts):
            yield document
            size += len(document.text.encode())
            if size >= most:
                break


def choose_places(sizes: list[int], wanted: int) -> list[tuple[int, int]]:
    """(index, bytes) of the places to read so that together they give `wanted` bytes, if there are as many.

    At least 64 evenly spaced places, more where these are too small, each giving about the same.
    """
    if sum(sizes) <= wanted:
        # Sizes are estimates: what is to be read whole is read to its end.
        return [(index, wanted) for index in range(len(sizes))]
    count = min(_PLACES, len(sizes))
    while True:
        chosen = sorted({index * len(sizes) // count for index in range(count)})
        if sum(sizes[index] for index in chosen) >= wanted or count == len(sizes):
            break
        count = min(2 * count, len(sizes))
    left, most = wanted, 0
    ordered = sorted(sizes[index] for index in chosen)
    for number, size in enumerate(ordered):
        most = -(-left // (len(ordered) - number))
        if size >= most:
            break
        left -= size
    return [(index, max(most, _MIN_PLACE_BYTES)) for index in chosen]
