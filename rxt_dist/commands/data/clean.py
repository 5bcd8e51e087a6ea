"""`rxt-dist data clean`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from rxt_dist.commands.data.common import JSON, emit, print_table, progress_bytes
from rxt_dist.commands.data.corpus import CORPUS, read_corpus
from rxt_dist.errors import ConfigError, nearest

if TYPE_CHECKING:
    from data_prep.cleaning.clean import CleanReport, SourceReport
    from data_prep.units import Slice, Unit
    from rxt_dist.config.clean import CleanConfig

_SHOWN_CHARACTERS = 100


def clean(
    inputs: list[str] = CORPUS,
    filters: list[str] = typer.Option(
        [], "--filter", help="NAME=VALUE as in build.clean, for example min_letters=0.6; repeat it for more."
    ),
    sample: int = typer.Option(10_000, min=1, help="Documents read of each source, from files all over it."),
    as_json: bool = JSON,
) -> None:
    """Try filters: what would be dropped of a corpus, why, and samples of it. Nothing is written.

    Example: `rxt-dist data clean my_texts/ --filter min_characters=200 --filter max_line_repetition=0.3`, or
    `rxt-dist data clean DATA.yaml` with the filters of its `build.clean`. Names and defaults stand in
    docs/configuration.md. Filters are tried in their order, and the first that a document fails is its reason.
    Duplicates need the whole corpus: `rxt-dist data build` finds them and reports them in clean.json.
    """
    build, units = read_corpus(inputs)
    config = _with(build.clean, filters)
    report = _try(units, config, sample)
    value = {"clean": config.model_dump(mode="json")} | report.to_dict()

    def show() -> None:
        _print(report)
        if config.exact_duplicates or config.near_duplicates is not None:
            print("Duplicates are not looked for here; `rxt-dist data build` does it over the whole corpus.")

    emit(as_json, value, show)


def _with(config: CleanConfig, given: list[str]) -> CleanConfig:
    """The configuration with `NAME=VALUE` settings over it.

    Raises:
        ConfigError: an unknown name, a value that is not allowed, or nothing to try at all.
    """
    import yaml
    from pydantic import ValidationError

    from data_prep.cleaning.clean import filters_of
    from rxt_dist.config.clean import CleanConfig

    values: dict[str, Any] = config.model_dump()
    known = list(CleanConfig.model_fields)
    for item in given:
        name, _, value = item.partition("=")
        if name not in known or not value:
            raise ConfigError(
                f"--filter is '{item}'; it must be NAME=VALUE with one of {', '.join(known)}.{nearest(name, known)}"
            )
        try:
            values[name] = yaml.safe_load(value)
            config = CleanConfig.model_validate(values)
        except (yaml.YAMLError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "it is not YAML"
            raise ConfigError(f"--filter {item} is not allowed: {reason}.") from error
    duplicates = config.exact_duplicates or config.near_duplicates is not None
    if config.normalise == "none" and not filters_of(config) and not duplicates:
        raise ConfigError(
            "No filter is on, so nothing would be dropped. Give some, such as --filter check_language=true --filter "
            "min_characters=200 --filter min_letters=0.6 --filter max_line_repetition=0.3 --filter "
            "max_ngram_repetition=0.3."
        )
    return config


def _try(units: tuple[Unit, ...], config: CleanConfig, sample: int) -> CleanReport:
    """Clean up to `sample` documents of each source, about the same number from each of its files or parts of one; of
    more parts than that, from evenly spaced ones."""
    from data_prep.cleaning.clean import Cleaner
    from data_prep.corpora import ReadCounts, read_slice

    per_source: dict[str | None, list[Slice]] = {}
    for unit in units:
        for part in unit.slices:
            per_source.setdefault(part.input.source, []).append(part)
    chosen = [_spaced(parts, sample) for parts in per_source.values()]
    cleaner, done = Cleaner(config), 0
    total = sum(part.text_bytes for parts in chosen for part in parts)
    with progress_bytes("Reading") as progress:
        for parts in chosen:
            left = sample
            for number, part in enumerate(parts):
                share = -(-left // (len(parts) - number))
                for document in islice(read_slice(part, ReadCounts()), share):
                    cleaner.clean(document)
                    left -= 1
                done += part.text_bytes
                progress(done, total)
    return cleaner.report


def _spaced(parts: list[Slice], most: int) -> list[Slice]:
    """All of them, or `most` from evenly spaced places."""
    return parts if len(parts) <= most else [parts[index * len(parts) // most] for index in range(most)]


def _print(report: CleanReport) -> None:
    reasons = list(report.dropped)
    rows = [_row(name, report.sources[name], reasons) for name in sorted(report.sources)]
    columns = ["source", "documents", "kept", "kept characters", "normalised", *reasons]
    print_table(f"Of {report.documents:,} documents {report.kept:,} would be kept", columns, rows)
    for name in sorted(report.sources):
        for reason in ("kept", *reasons):
            for found in report.sources[name].samples.get(reason, []):
                text = " ".join(found["text"].split())[:_SHOWN_CHARACTERS]
                print(f"{name}, {reason}: {Path(found['id']).name}: {text}")


def _row(name: str, source: SourceReport, reasons: list[str]) -> list[str]:
    share = f"{100 * source.kept_characters / max(source.characters, 1):.1f} %"
    counts = [f"{source.dropped.get(reason, 0):,}" for reason in reasons]
    return [name, f"{source.documents:,}", f"{source.kept:,}", share, f"{source.normalised:,}", *counts]
