"""From finished units to a dataset: their totals and reports added up, and the top manifest, written last."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.building.inputs import discard_records
from data_prep.building.unit import UNITS_FOLDER, finished_unit
from data_prep.cleaning.deduplicate import discard_surveys
from data_prep.corpora import ReadCounts
from data_prep.units import Plan
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.manifest import DatasetManifest, SourceInfo
from rxt_dist.data.sealing import finish_dataset
from rxt_dist.data.writer import ShardSpec
from rxt_dist.errors import DataError
from rxt_dist.files import write_json_atomic

if TYPE_CHECKING:
    from data_prep.cleaning.clean import CleanReport

CLEAN_REPORT = "clean.json"


def merge(out: Path, plan: Plan, spec: ShardSpec) -> tuple[DatasetManifest, ReadCounts, CleanReport | None]:
    """Write `dataset.json` for finished units. Repeating it changes nothing.

    Returns:
        The manifest, what reading met over all units, and what filters and duplicates dropped, where any were on.

    Raises:
        DataError: no unit has a single document.
    """
    sources: dict[str, SourceInfo] = {}
    counts = ReadCounts()
    reports: list[dict[str, Any]] = []
    for unit in plan.units:
        content = finished_unit(out, unit, spec.spec_hash)
        assert content is not None, f"unit {unit.name} vanished while its dataset was finished"
        counts.add(ReadCounts(**content["counts"]))
        reports += [content["clean"]] if "clean" in content else []
        for value in content["sources"]:
            source = SourceInfo.from_dict(value)
            sources[source.name] = sources[source.name] + source if source.name in sources else source
    if not sources:
        raise DataError(
            f"The corpus is empty: {len(plan.inputs)} files hold no usable document ({counts.empty} empty, "
            f"{counts.not_text} not text, {counts.too_large} above build.max_document_mb, {counts.documents} dropped "
            f"by the filters). Check the inputs {[item.name for item in plan.inputs[:5]]}."
        )
    dropped = _write_clean_report(out, reports) if reports else None
    manifest = DatasetManifest(
        seq_len=spec.seq_len,
        vocab_size=spec.vocab_size,
        tokenizer_sha256=spec.tokenizer_sha256,
        spec_hash=spec.spec_hash,
        packing_version=spec.packing_version,
        inputs=tuple(InputFile(item.name, item.bytes, fingerprint=item.fingerprint) for item in plan.inputs),
        sources=tuple(sources[name] for name in sorted(sources)),
    )
    discard_surveys(out, list(plan.units))
    finished = finish_dataset(out, manifest, [unit.name for unit in plan.units])
    discard_records(out)
    for lock in (out / UNITS_FOLDER).glob(".*.lock"):
        lock.unlink(missing_ok=True)
    return finished, counts, dropped


def _write_clean_report(out: Path, reports: list[dict[str, Any]]) -> CleanReport:
    from data_prep.cleaning.clean import CleanReport

    total = CleanReport()
    for report in reports:
        total.add(CleanReport.from_dict(report))
    write_json_atomic(out / CLEAN_REPORT, total.to_dict())
    return total
