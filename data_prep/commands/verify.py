"""`rxt-dist data verify`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import DATASET, JSON, emit, progress_bytes, say
from rxt_dist.errors import ConfigError, DataError

if TYPE_CHECKING:
    from data_prep.shards.repair import Repaired
    from rxt_dist.data.verify import Report


def verify(
    dataset: Path = DATASET,
    quick: bool = typer.Option(False, "--quick", help="All but the content of the shards: seconds at any size."),
    full: bool = typer.Option(False, "--full", help="Every bit of every file. This is the default."),
    deep: int | None = typer.Option(None, min=1, help="Trace so many random documents back to their texts."),
    repair: bool = typer.Option(False, "--repair", help="Check all, mend what is damaged, and check all again."),
    seed: int = typer.Option(0, help="With --deep: chooses the documents."),
    threads: int | None = typer.Option(None, min=1, help="Files hashed at once; default: one a core, at most 8."),
    as_json: bool = JSON,
) -> None:
    """Is a dataset what its manifest says? Exit code 65 where anything is damaged, with the names of the files.

    Example: `rxt-dist data verify data/mine`. With `--repair` small files come back from their copies, row checksums
    from their shards, and shards from the texts they were built from; nothing is replaced by anything but the exact
    original. `--deep 100` reads 100 documents again from their source and compares every token. Interactions and
    imported corpora do not keep where their inputs lie: their shards are built again by the command that made them.
    """
    if sum((quick, full, deep is not None, repair)) > 1:
        raise ConfigError("Give one of --quick, --full, --deep and --repair; --repair checks everything by itself.")
    if deep is not None:
        _deep(dataset, deep, seed, as_json)
        return
    started = time.monotonic()
    report, mended = _check(dataset, quick, threads), None
    if repair and report.findings:
        mended = _repair(dataset, report)
        report = _check(dataset, False, threads)
    value = _value(dataset, report, "quick" if quick else "full", mended) | {
        "seconds": round(time.monotonic() - started, 3)
    }
    emit(as_json, value, lambda: _print(dataset, report, quick, mended))
    _refuse(dataset, report, mended)


def _check(dataset: Path, quick: bool, threads: int | None) -> Report:
    from rxt_dist.data.verify import verify_full, verify_quick

    if quick:
        return verify_quick(dataset)
    with progress_bytes("Verifying") as progress:
        return verify_full(dataset, threads, progress)


def _repair(dataset: Path, report: Report) -> Repaired:
    from data_prep.shards.repair import repair

    for finding in report.findings:
        say(f"{finding.file} {finding.problem}")
    with progress_bytes("Building again") as progress:
        return repair(dataset, report, say, progress)


def _value(dataset: Path, report: Report, mode: str, mended: Repaired | None) -> dict[str, Any]:
    value = {
        "dataset": str(dataset),
        "mode": mode,
        "files": report.files,
        "bytes": report.bytes,
        "root_digest": report.manifest.root_digest if report.manifest else None,
        "damaged": {finding.file: finding.problem for finding in report.findings},
        "unknown": list(report.unknown),
        "unsealed": report.unsealed,
    }
    if mended is not None:
        value["restored"] = list(mended.restored)
        value["not_restored"] = {finding.file: finding.problem for finding in mended.failed}
    return value


def _print(dataset: Path, report: Report, quick: bool, mended: Repaired | None) -> None:
    for name in mended.restored if mended else ():
        print(f"restored {name}")
    for name in report.unknown:
        print(f"unknown file {name}: the manifest does not name it, and nothing reads it")
    if not report.findings and report.manifest:
        checked = "the contents of shards not looked at" if quick else f"{report.bytes / 1e6:.1f} MB"
        print(f"{dataset} is sound: {report.files:,} files, {checked}, root digest {report.manifest.root_digest}.")
    if report.unsealed:
        print(
            "An earlier version finished it, so that this holds for shards and tokenizer alone: nothing vouches for "
            "the other files. Run the same `rxt-dist data interactions` again, which seals it and builds nothing anew."
        )


def _refuse(dataset: Path, report: Report, mended: Repaired | None) -> None:
    from rxt_dist.data.origin import rebuilding
    from rxt_dist.data.verify import require_sound

    if mended and mended.failed:
        failed = "; ".join(f"{finding.file} {finding.problem}" for finding in mended.failed)
        advice = rebuilding(dataset)
        raise DataError(
            f"{dataset} is still damaged: {failed}. {advice[0].upper()}{advice[1:]}; or take the files from a copy of "
            f"the dataset."
        )
    require_sound(report, dataset)


def _deep(dataset: Path, count: int, seed: int, as_json: bool) -> None:
    from dataclasses import asdict

    from data_prep.shards.trace import verify_deep
    from rxt_dist.data.manifest import DatasetManifest
    from rxt_dist.data.origin import keeps_plan, maker
    from rxt_dist.data.verify import require_sound, verify_quick

    require_sound(report := verify_quick(dataset), dataset)
    if not isinstance(report.manifest, DatasetManifest) or not keeps_plan(dataset):
        raise ConfigError(
            f"{dataset} was made by `{maker(dataset)}`, which does not keep where its inputs lie, so --deep has "
            f"nothing to read again. --full reads every bit of it; to compare it with its inputs, run the same command "
            f"with another --out, and `rxt-dist data diff` on the two."
        )
    say(f"Tracing {min(count, report.manifest.totals.documents)} random documents to their texts")
    with progress_bytes("Tracing") as progress:
        found = verify_deep(dataset, report.manifest, count, seed, progress)
    value = {
        "dataset": str(dataset),
        "mode": "deep",
        "seed": seed,
        "root_digest": report.manifest.root_digest,
        "asked": found.asked,
        "documents": found.documents,
        "tokens": found.tokens,
        "mismatches": [asdict(item) for item in found.mismatches],
        "untraced": dict(found.untraced),
        "untraced_documents": found.untraced_documents,
    }
    has = report.manifest.totals.documents

    def show() -> None:
        equal = found.documents - len(found.mismatches)
        print(f"{equal} of {found.documents} documents ({found.tokens:,} tokens) are exactly what their texts give.")
        if has < count:
            print(f"Asked for were {count}, but the dataset has no more than {has}.")
        if found.untraced_documents:
            print(f"{found.untraced_documents} more could not be compared, as their texts cannot be read.")

    emit(as_json, value, show)
    if found.mismatches:
        items = [f"document {item.document} of unit {item.unit} {item.id} {item.problem}" for item in found.mismatches]
        raise DataError(
            f"{len(items)} of {found.documents} documents of {dataset} are not what their texts give: "
            f"{'; '.join(items[:3])}{', ...' if len(items) > 3 else ''}. The texts or filters have changed since."
        )
    if found.untraced:
        more = f" (and {len(found.untraced) - 3} more units)" if len(found.untraced) > 3 else ""
        raise DataError(" ".join(problem for _, problem in found.untraced[:3]) + more)
