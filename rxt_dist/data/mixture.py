"""From a data configuration to the global order. Training and every tool that speaks of positions take it from here."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rxt_dist.config.phases import BLOCK, phase_lengths, phase_paths
from rxt_dist.config.run import DataConfig, PhaseConfig
from rxt_dist.data.manifest import DatasetManifest, SourceInfo
from rxt_dist.data.sampler import (
    MIN_WEIGHT,
    GlobalOrder,
    OrderSource,
    Phase,
    integer_weights,
    proportional_weights,
)
from rxt_dist.errors import ConfigError, DataError, nearest


@dataclass(frozen=True)
class PhaseDataset:
    """A dataset that phases read, by what its manifest says of it."""

    path: Path
    digest: str
    seq_len: int
    tokenizer_sha256: str
    sources: tuple[SourceInfo, ...]

    @staticmethod
    def of(path: Path, manifest: DatasetManifest) -> PhaseDataset:
        return PhaseDataset(
            path, manifest.root_digest, manifest.seq_len, manifest.tokenizer_sha256, tuple(manifest.sources)
        )


@dataclass(frozen=True)
class PhaseDatasets:
    """The datasets of a run, in the order in which its phases first read them.

    of_phase: for each phase of the mixture the number of the one that it reads.
    """

    datasets: tuple[PhaseDataset, ...]
    of_phase: tuple[int, ...] = ()

    @property
    def seq_len(self) -> int:
        """Tokens of a row, of all of them."""
        return self.datasets[0].seq_len

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(dataset.digest for dataset in self.datasets)

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """The sources of all; those of the second dataset are called `name@2`, and so on."""
        return tuple(
            replace(source, name=f"{source.name}@{number}") if number > 1 else source
            for number, dataset in enumerate(self.datasets, start=1)
            for source in dataset.sources
        )

    def own(self, source: int) -> tuple[PhaseDataset, int]:
        """The dataset of a source, and the number that the source has in it."""
        for dataset in self.datasets:
            if source < len(dataset.sources):
                return dataset, source
            source -= len(dataset.sources)
        raise IndexError(source)

    def order_sources(self) -> list[OrderSource]:
        numbers = [number for number, dataset in enumerate(self.datasets) for _ in dataset.sources]
        return [
            OrderSource(source.name, source.train.totals.rows, number)
            for source, number in zip(self.sources, numbers, strict=True)
        ]


def phase_datasets(data: DataConfig, look: Callable[[Path], PhaseDataset]) -> PhaseDatasets:
    """What the phases of a mixture read. A dataset is its content: two folders of one digest are one dataset.

    Args:
        look: opens the dataset of a folder.

    Raises:
        DataError: one of them has another tokenizer or row length than the first.
    """
    seen: dict[Path, PhaseDataset] = {}
    different: list[PhaseDataset] = []
    numbers = []
    for path in (data.path, *phase_paths(data)):
        if path not in seen:
            seen[path] = look(path)
            _require_alike(seen[path], seen[data.path])
        digests = [dataset.digest for dataset in different]
        if seen[path].digest not in digests:
            different.append(seen[path])
            digests.append(seen[path].digest)
        numbers.append(digests.index(seen[path].digest))
    return PhaseDatasets(tuple(different), tuple(numbers[1:]))


def _require_alike(one: PhaseDataset, first: PhaseDataset) -> None:
    if one.tokenizer_sha256 != first.tokenizer_sha256:
        raise DataError(
            f"{one.path}, which a phase of data.mixture names, was made with tokenizer {one.tokenizer_sha256[:16]}..., "
            f"but {first.path} with tokenizer {first.tokenizer_sha256[:16]}...: every id would mean something else. "
            f"Build it again with {first.path}/tokenizer.json."
        )
    if one.seq_len != first.seq_len:
        raise DataError(
            f"{one.path}, which a phase of data.mixture names, has rows of {one.seq_len} tokens, but {first.path} has "
            f"rows of {first.seq_len}: make them alike with `rxt-dist data repack {one.path} --seq-len {first.seq_len} "
            f"--out DIR`."
        )


def planned_order(read: PhaseDatasets, data: DataConfig, total_tokens: int | None, seed: int) -> GlobalOrder:
    """The order in which a run of `total_tokens` reads these datasets.

    Without `data.mixture` every source is read in proportion to its rows. A phase that others follow is rounded up to
    whole blocks of 4,096 rows. The phases are cut where the run ends, so that what it never reads counts for nothing; a
    last phase without tokens lasts until then. Where `total_tokens` is None the run is as long as the phases, or one
    pass over all rows of its dataset in place of what has no length.

    Raises:
        ConfigError: no training rows, a mixture that names a source or language that is not there, one that does not
            cover the run, a length that the blocks would change by more than 1 %, or what `GlobalOrder` refuses.
    """
    one_pass = [_one_pass(dataset) for dataset in read.datasets]
    sources, numbers = read.order_sources(), read.of_phase or (0,)
    configured = data.mixture or (PhaseConfig(by_size=True),)
    weights = [
        iter(_weights(phase, f"data.mixture.{index}", read.datasets[number]))
        for index, (phase, number) in enumerate(zip(configured, numbers, strict=True))
    ]
    lengths = phase_lengths(data.mixture, total_tokens, read.seq_len) if data.mixture else [total_tokens]
    # Phases beyond the end of the run have no length.
    phases = [
        Phase(length or one_pass[number], tuple(next(own) if source.dataset == number else 0 for source in sources))
        for length, number, own in zip(lengths, numbers, weights, strict=False)
    ]
    return GlobalOrder(sources, phases, seed, read.seq_len, data.max_epochs)


def _one_pass(dataset: PhaseDataset) -> int:
    """Tokens of all training rows."""
    rows = sum(source.train.totals.rows for source in dataset.sources)
    if not rows:
        raise ConfigError(
            f"{dataset.path} has no training rows in any of its {len(dataset.sources)} sources: lower "
            f"build.eval_fraction, or add text, and build it again."
        )
    return rows * dataset.seq_len


def _weights(phase: PhaseConfig, place: str, dataset: PhaseDataset) -> tuple[int, ...]:
    """The weight of each source of its dataset in a phase; one that was asked for is never dropped."""
    sources = dataset.sources
    if phase.by_size:
        return proportional_weights([source.train.totals.rows for source in sources])
    if phase.languages:
        return integer_weights(_language_shares(phase, place, dataset))
    asked: dict[str, float] = {**phase.weights, **phase.tokens_per_source}
    _require_known("source", asked, [source.name for source in sources], place, dataset)
    weights = integer_weights([asked.get(source.name, 0.0) for source in sources])
    whole = sum(asked.values())
    for source, weight in zip(sources, weights, strict=True):
        if source.name in asked and weight < MIN_WEIGHT:
            raise ConfigError(
                f"{place} gives source '{source.name}' {asked[source.name]:g}, a share of "
                f"{asked[source.name] / whole:.9g}; the smallest share that can be kept exactly is 1/{BLOCK} "
                f"({1 / BLOCK:.9g}): raise it, or leave the source out."
            )
    return weights


def _language_shares(phase: PhaseConfig, place: str, dataset: PhaseDataset) -> list[float]:
    """Each language has its share, and within it every source is passed over equally often.

    What is too small to stand in every block leaves its share to the others of its language; the plan shows it.
    """
    sources = dataset.sources
    there = sorted({source.language for source in sources if source.train.totals.rows})
    _require_known("language", phase.languages, there, place, dataset)
    shares = _shares_by_size(phase, [(source.language, source.train.totals.rows) for source in sources])
    kept = [
        (source.language, source.train.totals.rows if share * BLOCK >= 1 else 0)
        for source, share in zip(sources, shares, strict=True)
    ]
    for language in phase.languages:
        if not any(rows for its, rows in kept if its == language):
            largest = max(share for source, share in zip(sources, shares, strict=True) if source.language == language)
            raise ConfigError(
                f"{place} names the language '{language}', but the largest of its sources would have a share of "
                f"{largest:.9g} and the smallest share that can be kept exactly is 1/{BLOCK} ({1 / BLOCK:.9g}): raise "
                f"the share of '{language}', build its text as fewer sources, or leave it out."
            )
    return _shares_by_size(phase, kept)


def _shares_by_size(phase: PhaseConfig, sources: Sequence[tuple[str, int]]) -> list[float]:
    """The share of each (language, rows), of a whole of 1."""
    rows = dict.fromkeys(phase.languages, 0)
    for language, count in sources:
        if language in rows:
            rows[language] += count
    # As in `integer_weights`, a power of two keeps the sum of huge shares finite.
    unit = math.ldexp(1.0, math.frexp(max(phase.languages.values()))[1] - 1)
    whole = sum(share / unit for share in phase.languages.values())
    return [
        phase.languages.get(language, 0.0) / unit / whole * count / max(rows.get(language, 0), 1)
        for language, count in sources
    ]


def _require_known(what: str, asked: dict[str, float], known: Sequence[str], place: str, dataset: PhaseDataset) -> None:
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"{place} names the {what} '{name}', but {dataset.path} holds {', '.join(known)}.{nearest(name, known)}"
            )
