"""From a data configuration to the global order. Training and every tool that speaks of positions take it from here."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rxt_dist.config.phases import BLOCK, phase_lengths
from rxt_dist.config.run import DataConfig, PhaseConfig
from rxt_dist.data.manifest import SourceInfo
from rxt_dist.data.sampler import (
    MIN_WEIGHT,
    GlobalOrder,
    OrderSource,
    Phase,
    integer_weights,
    proportional_weights,
)
from rxt_dist.errors import ConfigError, nearest


def planned_order(
    sources: Sequence[SourceInfo], seq_len: int, data: DataConfig, total_tokens: int | None, seed: int
) -> GlobalOrder:
    """The order in which a run of `total_tokens` reads these sources.

    Without `data.mixture` every source is read in proportion to its rows. A phase that others follow is rounded up to
    whole blocks of 4,096 rows. The phases are cut where the run ends, so that what it never reads counts for nothing; a
    last phase without tokens lasts until then. Where `total_tokens` is None the run is as long as the phases, or one
    pass over all rows in place of what has no length.

    Raises:
        ConfigError: no training rows, a mixture that names a source or language that is not there, one that does not
            cover the run, a length that the blocks would change by more than 1 %, or what `GlobalOrder` refuses.
    """
    rows = [OrderSource(source.name, source.train.totals.rows) for source in sources]
    one_pass = sum(source.rows for source in rows) * seq_len
    if not one_pass:
        raise ConfigError(
            f"{data.path} has no training rows in any of its {len(rows)} sources: lower build.eval_fraction, or add "
            f"text, and build it again."
        )
    weights = [_weights(phase, f"data.mixture.{index}", sources, data) for index, phase in enumerate(data.mixture)]
    if weights:
        lengths = phase_lengths(data.mixture, total_tokens, seq_len)
        # Phases beyond the end of the run have no length.
        phases = [Phase(length or one_pass, shares) for length, shares in zip(lengths, weights, strict=False)]
    else:
        phases = [Phase(total_tokens or one_pass, proportional_weights([source.rows for source in rows]))]
    return GlobalOrder(rows, phases, seed, seq_len, data.max_epochs)


def _weights(phase: PhaseConfig, place: str, sources: Sequence[SourceInfo], data: DataConfig) -> tuple[int, ...]:
    """The weight of each source in a phase; one that was asked for is never dropped."""
    if phase.languages:
        return integer_weights(_language_shares(phase, place, sources, data))
    asked: dict[str, float] = {**phase.weights, **phase.tokens_per_source}
    _require_known("source", asked, [source.name for source in sources], place, data)
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


def _language_shares(phase: PhaseConfig, place: str, sources: Sequence[SourceInfo], data: DataConfig) -> list[float]:
    """Each language has its share, and within it every source is passed over equally often.

    What is too small to stand in every block leaves its share to the others of its language; the plan shows it.
    """
    there = sorted({source.language for source in sources if source.train.totals.rows})
    _require_known("language", phase.languages, there, place, data)
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


def _require_known(what: str, asked: dict[str, float], known: Sequence[str], place: str, data: DataConfig) -> None:
    for name in asked:
        if name not in known:
            raise ConfigError(
                f"{place} names the {what} '{name}', but {data.path} holds {', '.join(known)}.{nearest(name, known)}"
            )
