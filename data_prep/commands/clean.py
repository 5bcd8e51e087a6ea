"""`rxt-dist data clean`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import JSON, emit, print_table, progress_bytes
from data_prep.commands.corpus import CORPUS, read_corpus
from rxt_dist.errors import ConfigError, nearest

if TYPE_CHECKING:
    from data_prep.cleaning.clean import SourceReport
    from data_prep.cleaning.interval import Interval
    from data_prep.cleaning.trial import Expected, Trial
    from rxt_dist.config.clean import CleanConfig

_SHOWN_CHARACTERS = 100


def clean(
    inputs: list[str] = CORPUS,
    filters: list[str] = typer.Option(
        [], "--filter", help="NAME=VALUE as in build.clean, for example min_letters=0.6; repeat it for more."
    ),
    sample_mb: float = typer.Option(
        64.0,
        min=0.01,
        metavar="MB",
        help="Text in MB that is tried of each source and language, from all over it; all of it where there is less.",
    ),
    as_json: bool = JSON,
) -> None:
    """Try filters: what would be dropped of a corpus, why, and samples of it. Nothing is written.

    Example: `rxt-dist data clean my_texts/ --filter min_characters=200 --filter max_line_repetition=0.3`, or
    `rxt-dist data clean DATA.yaml` with the filters of its `build.clean`. Names and defaults stand in
    docs/configuration.md. Filters are tried in their order, and the first that a document fails is its reason.
    Every document has the same chance to be tried, and bounds say how much a build would drop; where all were tried
    the figures are exact. Duplicates need the whole corpus: `rxt-dist data build` finds them, and reports them in
    clean.json.
    """
    from data_prep.cleaning.trial import try_filters

    build, units = read_corpus(inputs)
    config = _with(build.clean, filters)
    with progress_bytes("Reading") as progress:
        trial = try_filters(units, config, int(sample_mb * 1e6), progress)
    value = {"clean": config.model_dump(mode="json")} | _value(trial)

    def show() -> None:
        _print(trial)
        if config.exact_duplicates or config.near_duplicates is not None:
            print("Duplicates are not looked for here: `rxt-dist data build` does, and drops them beside these.")

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
            raise ConfigError(f"--filter {item} is not allowed: {reason.removeprefix('Value error, ')}.") from error
    duplicates = config.exact_duplicates or config.near_duplicates is not None
    if config.normalise == "none" and not filters_of(config) and not duplicates:
        raise ConfigError(
            "No filter is on, so nothing would be dropped. Give some, such as --filter check_language=true --filter "
            "min_characters=200 --filter min_letters=0.6 --filter max_line_repetition=0.3 --filter "
            "max_ngram_repetition=0.3."
        )
    return config


def _value(trial: Trial) -> dict[str, Any]:
    """Plain values for JSON; shares and bounds are exact where `whole`."""
    from data_prep.cleaning.interval import CONFIDENCE

    return {
        "whole": trial.whole,
        "confidence": CONFIDENCE,
        **(_expected(trial.all) if trial.all is not None else {"documents": 0, "tried": 0}),
        "sources": {
            name: _expected(expected)
            | (_exact(trial.report.sources[name]) if trial.whole else {})
            | {"samples": dict(trial.report.sources[name].samples)}
            for name, expected in trial.sources.items()
        },
    }


def _expected(expected: Expected) -> dict[str, Any]:
    return {
        "documents": expected.documents,
        "tried": expected.tried,
        "dropped": vars(expected.dropped) | {"documents": round(expected.dropped.share * expected.documents)},
        "reasons": {reason: vars(found) for reason, found in expected.reasons.items()},
    }


def _exact(report: SourceReport) -> dict[str, Any]:
    """What is told where all documents were tried only: in a sample not all of them stand for as many."""
    return {
        "kept_characters": report.kept_characters / max(report.characters, 1),
        "normalised": report.normalised,
    }


def _print(trial: Trial) -> None:
    from data_prep.cleaning.interval import CONFIDENCE

    if trial.all is None:
        print("There is no document to try.")
        return
    every, about = trial.all, "" if trial.whole else "about "
    print(
        f"All {every.tried:,} documents were tried: the build drops exactly these."
        if trial.whole
        else f"{every.tried:,} of about {every.documents:,} documents ({_percent(every.tried / every.documents)}) were "
        f"tried. What the build drops lies between the bounds, each of them true in {CONFIDENCE:.0%} of samples; a "
        f"larger --sample-mb narrows them."
    )
    kinds = [(name, trial.sources[name]) for name in sorted(trial.sources)] + [("all sources", every)]
    columns = ["source", "documents", "tried", "dropped", *([] if trial.whole else ["between"]), *every.reasons]
    rows = [
        [
            name,
            f"{of.documents:,}",
            f"{of.tried:,}",
            _percent(of.dropped.share),
            *([] if trial.whole else [_bounds(of.dropped)]),
            *(_percent(of.reasons[reason].share) if reason in of.reasons else "0" for reason in every.reasons),
        ]
        for name, of in kinds
    ]
    dropped = every.dropped.share * every.documents
    print_table(f"{about}{dropped:,.0f} documents would be dropped".capitalize(), columns, rows)
    if not trial.whole and every.reasons:
        found = ", ".join(f"{reason} {_bounds(of)}" for reason, of in every.reasons.items())
        print(f"Between, over all sources: {found}.")
    for name, report in sorted(trial.report.sources.items()) if trial.whole else ():
        kept = _percent(_exact(report)["kept_characters"])
        print(f"{name}: {kept} of the characters kept; {report.normalised:,} normalised.")
    for name, report in sorted(trial.report.sources.items()):
        for reason in ("kept", *every.reasons):
            for sample in report.samples.get(reason, []):
                text = " ".join(sample["text"].split())[:_SHOWN_CHARACTERS]
                print(f"{name}, {reason}: {Path(sample['id']).name}: {text}")


def _bounds(found: Interval) -> str:
    return f"{_percent(found.low)} and {_percent(found.high)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
