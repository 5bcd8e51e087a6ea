"""What the filters would drop of a corpus, from a sample in which every document has the same chance to be.

Filters are dearer than reading, so up to eight times as much text is read as is tried. A group, the texts of one
source and language, of no more than that is read whole, and each document is tried with the same probability: such a
sample knows no neighbours. A larger group is cut into places of the same bytes, of which some are read, chosen at
random from all over it; a document belongs to the place where it begins, so that long ones have no better chance than
short ones. What cannot be cut finely, packed files and row groups, is chosen whole, beside others of its size: at least
16 of each. A .txt is a document and a place. `interval.py` says how sure the result is.

The sample is a function of the plan of the inputs and of the amount: the same command draws the same documents.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from data_prep.cleaning.clean import REASONS, Cleaner, CleanReport
from data_prep.cleaning.interval import Drawn, Interval, Tally, interval
from data_prep.corpora import ReadCounts, named_language, read_slice
from data_prep.readers.base import Slice
from data_prep.units import Unit
from rxt_dist.config.clean import CleanConfig

DROPPED = "dropped"

_READ_PER_TRIED = 8
_PLACES = 2048  # of a group that is not read whole, about
_LEAST_PARTS = 16
_SIZE_CLASS_BITS = 3  # sizes of one class differ by less than a factor of eight


@dataclass
class Stratum:
    """Parts of a group that are cut alike: which are read, and the tally of each source and of all (None)."""

    drawn: Drawn
    chosen: list[Slice]
    counts: ReadCounts = field(default_factory=ReadCounts)
    tallies: dict[str | None, Tally] = field(default_factory=dict)

    def tally(self, source: str | None) -> Tally:
        return self.tallies.setdefault(source, Tally())


@dataclass(frozen=True)
class Expected:
    """What a build would drop of a source, or of all: documents (estimated unless all were tried), how many of them
    were tried, the share dropped, and that of each reason that was met."""

    documents: int
    tried: int
    dropped: Interval
    reasons: dict[str, Interval]


@dataclass(frozen=True)
class Trial:
    """The result: the report of the documents that were tried, and what follows for the corpus.

    `whole` says that every document was tried, so that all figures are exact; `all` is None for an empty corpus.
    """

    report: CleanReport
    whole: bool
    all: Expected | None
    sources: dict[str, Expected]


def try_filters(
    units: Iterable[Unit],
    config: CleanConfig,
    sample_bytes: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    seed: int = 0,
) -> Trial:
    """Try filters on about `sample_bytes` of text of each source and language, or on all there is.

    Args:
        progress: told (bytes of text read, bytes to read).

    Raises:
        DataError: an input cannot be read.
    """
    rng = random.Random(seed)
    strata = [stratum for parts in _groups(units) for stratum in _draw(parts, sample_bytes, rng)]
    total, done = sum(part.text_bytes for stratum in strata for part in stratum.chosen), 0
    cleaner = Cleaner(config)
    for stratum in strata:
        for part in stratum.chosen:
            _try_part(part, stratum, cleaner, rng)
            done += part.text_bytes
            progress(done, total)
    return _trial(strata, cleaner.report)


def _try_part(part: Slice, stratum: Stratum, cleaner: Cleaner, rng: random.Random) -> None:
    rate = stratum.drawn.rate
    tried, dropped = Counter[str | None](), dict[str | None, Counter[str]]()
    for document in read_slice(part, stratum.counts, None if rate == 1 else lambda: rng.random() < rate):
        reason = cleaner.clean(document)
        for source in (None, document.source):
            tried[source] += 1
            if isinstance(reason, str):
                dropped.setdefault(source, Counter()).update((DROPPED, reason))
    for source, documents in tried.items():
        stratum.tally(source).add_part(documents, dropped.get(source, Counter()))


def _trial(strata: list[Stratum], report: CleanReport) -> Trial:
    whole = all(stratum.drawn.whole for stratum in strata)
    names = sorted(report.sources)
    everything = _expected(strata, None) if names else None
    return Trial(report, whole, everything, {name: _expected(strata, name) for name in names})


def _expected(strata: list[Stratum], source: str | None) -> Expected:
    ours = [stratum for stratum in strata if source in stratum.tallies]
    sample = [(stratum.drawn, stratum.tallies[source]) for stratum in ours]
    met = Counter[str]()
    for _, tally in sample:
        met.update(tally.dropped)
    reasons = {reason: interval(sample, reason) for reason in REASONS if met[reason]}
    tried = sum(tally.documents for _, tally in sample)
    documents = sum(_documents(stratum, source) for stratum in (strata if source is None else ours))
    return Expected(round(documents), tried, interval(sample, DROPPED), reasons)


def _documents(stratum: Stratum, source: str | None) -> float:
    """About how many documents of a source a stratum holds. What was read has been counted, tried or not; but whose it
    is shows only when it is tried."""
    drawn = stratum.drawn
    if source is None or set(stratum.tallies) == {None, source}:
        return stratum.counts.documents * drawn.parts / drawn.read
    return drawn.weight * stratum.tallies[source].documents


# ---------------------------------------------------------------------------------------------------------------------
# Drawing
# ---------------------------------------------------------------------------------------------------------------------


def _groups(units: Iterable[Unit]) -> Iterator[list[Slice]]:
    """The slices of each source, and of each language where files or folders are named so."""
    groups: dict[tuple[str, str], list[Slice]] = {}
    for unit in units:
        for part in unit.slices:
            language = named_language(part.input) or ""
            groups.setdefault((part.input.source or "", language), []).append(part)
    yield from groups.values()


def _draw(parts: list[Slice], sample_bytes: int, rng: random.Random) -> list[Stratum]:
    """What to read of a group, and with which probability to try a document, so that this is the same for all."""
    size = sum(part.text_bytes for part in parts)
    share = min(1.0, sample_bytes / max(size, 1))
    to_read = _READ_PER_TRIED * sample_bytes
    if size <= to_read:
        return [Stratum(Drawn(len(parts), len(parts), share), parts)]
    strata = []
    left = to_read
    # From the smallest on, each may give an equal share of what is to be read; what it lacks goes to the others.
    cut = sorted(_cut(parts, to_read // _PLACES), key=lambda slices: sum(part.text_bytes for part, _ in slices))
    for number, slices in enumerate(cut):
        count, bytes_here = sum(places for _, places in slices), sum(part.text_bytes for part, _ in slices)
        wanted = left // (len(cut) - number)
        is_txt = _is_txt(slices[0][0])
        fraction = max(share, 0.0 if is_txt else wanted / max(bytes_here, 1))
        read = min(count, max(math.ceil(count * fraction), _LEAST_PARTS))
        left = max(left - bytes_here * read // count, 0)
        drawn = Drawn(count, read, 1.0 if is_txt else min(1.0, share * count / read))
        strata.append(Stratum(drawn, _places(slices, sorted(rng.sample(range(count), read)))))
    return strata


def _cut(parts: list[Slice], grain: int) -> list[list[tuple[Slice, int]]]:
    """The slices, each with the number of places of about `grain` bytes in it; together stand those of inputs of a
    size and places of a size, since a small file may hold documents of another kind than a large one."""
    sizes = Counter[str]()
    for part in parts:
        sizes[part.input.path] += part.text_bytes
    cut: dict[tuple[int, int] | None, list[tuple[Slice, int]]] = {}
    for part in parts:
        places = max(1, min(part.stop - part.start, -(-part.text_bytes // max(grain, 1))))
        kind = _size_class(sizes[part.input.path]), _size_class(part.text_bytes // places)
        cut.setdefault(None if _is_txt(part) else kind, []).append((part, places))
    return list(cut.values())


def _size_class(size: int) -> int:
    return size.bit_length() // _SIZE_CLASS_BITS


def _is_txt(part: Slice) -> bool:
    return part.input.hub is None and part.input.path.lower().endswith(".txt")


def _places(slices: list[tuple[Slice, int]], chosen: list[int]) -> list[Slice]:
    """The places of these numbers, counted over all slices."""
    found: list[Slice] = []
    numbers = iter(chosen)
    number, first = next(numbers, None), 0
    for part, places in slices:
        while number is not None and number < first + places:
            start, stop = (part.start + (part.stop - part.start) * (number - first + edge) // places for edge in (0, 1))
            found.append(Slice(part.input, start, stop, part.text_bytes // places))
            number = next(numbers, None)
        first += places
    return found
