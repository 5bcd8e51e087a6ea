"""`rxt-dist data mix`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import JSON, emit, print_table
from data_prep.commands.order import phase_dataset_of, require_end
from rxt_dist.commands.arguments import Overrides
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.config.run import DataConfig, RunConfig
    from rxt_dist.data.manifest import SourceInfo
    from rxt_dist.data.mixture import PhaseDataset, PhaseDatasets
    from rxt_dist.data.sampler import GlobalOrder


def mix(
    target: Path = typer.Argument(..., metavar="DATA.yaml|RUN.yaml|DATASET", help="Data file, run file or dataset."),
    overrides: Overrides = None,
    tokens: float | None = typer.Option(
        None, min=1, help="Tokens of training; without it those of the run, of the phases, or of one pass."
    ),
    as_json: bool = JSON,
) -> None:
    """Tell what a training reads of each source, phase by phase: tokens, passes, repeats, language shares.

    Example: `rxt-dist data mix configs/data/beta-400b.yaml`, or of a dataset with a mixture to try:
    `rxt-dist data mix shards/ 'mixture=[{languages: {en: 0.7, pl: 0.3}}]' --tokens 1e9`. Sizes are those of the built
    dataset, or what `rxt-dist data plan` expects where there is none yet. A plan that reads a source more often than
    `max_epochs` is shown and refused.
    """
    from rxt_dist.data.mixture import planned_order

    data, run = _data_of(target, overrides or [])
    read, origin = _datasets(data, run)
    sources = read.sources
    total = int(tokens) if tokens else run.train.total_tokens if run else None
    require_end(data, total, target, "give --tokens, or name the run file")
    unbounded = data.model_copy(update={"max_epochs": float("inf")})
    order = planned_order(read, unbounded, total, seed=0)
    phases, whole = _phases(order, sources)
    paths = [str(read.datasets[number].path) for number in read.of_phase or (0,)]
    value = {
        "target": str(target),
        "sizes": origin,
        "seq_len": read.seq_len,
        "tokens": sum(row.tokens for row in whole),
        "max_epochs": data.max_epochs,
        "phases": [
            {"dataset": path, "sources": [row.to_dict() for row in rows], "languages": _languages(rows)}
            for path, rows in zip(paths, phases, strict=False)
        ],
        "sources": [row.to_dict() for row in whole],
        "languages": _languages(whole),
    }
    emit(as_json, value, lambda: _print(target, origin, list(zip(paths, phases, strict=False)), whole))
    planned_order(read, data, total, seed=0)


@dataclass(frozen=True)
class _Row:
    """What is drawn from one source in a phase, or in all."""

    source: str
    language: str
    source_tokens: int
    tokens: int
    repeated_tokens: int  # of them, those that were read before, in this phase or an earlier one
    share: float

    @property
    def passes(self) -> float:
        return self.tokens / self.source_tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "passes": self.passes}


def _data_of(target: Path, overrides: list[str]) -> tuple[DataConfig, RunConfig | None]:
    """The data configuration, and the run if it is one."""
    from rxt_dist.config.load import load_data, load_run
    from rxt_dist.config.tree import Tree

    if not target.is_dir():
        values = Tree.read(target).values
        if isinstance(values, dict) and "train" in values:
            run = load_run(target, overrides)
            return run.data, run
    return load_data(target, overrides), None


def _datasets(data: DataConfig, run: RunConfig | None) -> tuple[PhaseDatasets, str]:
    """What the phases read, and where its sizes are from.

    Raises:
        ConfigError: dialogues, and no run that says how many turns of them are read.
    """
    from rxt_dist.data.dialogues import DialogueManifest, load_any_manifest
    from rxt_dist.data.manifest import DATASET_FILE
    from rxt_dist.data.mixture import phase_datasets

    expected = None if (data.path / DATASET_FILE).is_file() or data.build is None else _expected(data)

    def look(path: Path) -> PhaseDataset:
        if expected is not None and path == data.path:
            return expected[0]
        manifest = load_any_manifest(path)
        if run is None and isinstance(manifest, DialogueManifest):
            raise ConfigError(
                f"{path} holds dialogues, and how many turns of each are read, so how many tokens it has, is the "
                f"stage's to say: name the run file."
            )
        return phase_dataset_of(path, run, manifest)

    read = phase_datasets(data, look)
    others = "".join(f" and {dataset.path}" for dataset in read.datasets[1:])
    return read, (expected[1] if expected else f"the dataset {data.path}") + others


def _expected(data: DataConfig) -> tuple[PhaseDataset, str]:
    """The dataset that is not built yet, with the training rows that are expected of its sources."""
    from data_prep.documents.cost import Assumptions, default_rate, estimate
    from rxt_dist.data.manifest import SourceInfo, SplitInfo, Totals
    from rxt_dist.data.mixture import PhaseDataset

    if any(phase.path for phase in data.mixture):
        raise ConfigError(
            f"A phase of data.mixture names another dataset, but {data.path} is not built yet, so that nobody knows "
            f"whether their tokenizers are one: build it first (`rxt-dist data build`)."
        )
    cost = estimate(data, Assumptions(default_rate(data.build.backend if data.build else "auto")))
    assert data.seq_len is not None, "estimate refuses a data file without it"
    sources = tuple(
        SourceInfo(source.name, source.language, SplitInfo(Totals(rows=source.train_rows))) for source in cost.sources
    )
    origins = " and ".join(sorted({source.origin for source in cost.sources}))
    dataset = PhaseDataset(data.path, "", data.seq_len, "", sources)
    return dataset, f"expectations from {origins} sizes, as {data.path} is not built yet"


def _phases(order: GlobalOrder, sources: Sequence[SourceInfo]) -> tuple[list[list[_Row]], list[_Row]]:
    """What each phase draws from each source, and all together, at the lengths that the order gives the phases."""
    from rxt_dist.data.sampler import GlobalOrder, Phase

    lengths = [rows * order.seq_len for rows in order.phase_rows]
    before = [0] * len(sources)
    phases = []
    for count in range(1, len(lengths) + 1):
        part = [Phase(length, phase.weights) for length, phase in zip(lengths[:count], order.phases, strict=False)]
        plan = GlobalOrder(order.sources, part, order.seed, order.seq_len, float("inf")).plan()
        drawn = [source.tokens for source in plan]
        phases.append(_rows(order, sources, before, drawn))
        before = drawn
    return phases, _rows(order, sources, [0] * len(sources), before)


def _rows(order: GlobalOrder, sources: Sequence[SourceInfo], before: list[int], after: list[int]) -> list[_Row]:
    """What is drawn from each source after its first `before` tokens and up to `after`."""
    total = max(sum(after) - sum(before), 1)
    rows = []
    for source, start, end in zip(sources, before, after, strict=True):
        size = source.train.totals.rows * order.seq_len
        repeated = max(end - size, 0) - max(start - size, 0)
        rows.append(_Row(source.name, source.language, size, end - start, repeated, (end - start) / total))
    return rows


def _languages(rows: list[_Row]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for row in rows:
        shares[row.language] = shares.get(row.language, 0.0) + row.share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _print(target: Path, origin: str, phases: list[tuple[str, list[_Row]]], whole: list[_Row]) -> None:
    of = len({path for path, _ in phases}) > 1
    named = [
        (f"phase {number}{f' of {path}' if of else ''}", rows) for number, (path, rows) in enumerate(phases, start=1)
    ] * (len(phases) > 1)
    for name, rows in [*named, ("all", whole)]:
        tokens = sum(row.tokens for row in rows)
        print_table(
            f"{target}, {name}: {tokens:,} tokens",
            ["source", "language", "tokens of the source", "tokens read", "share", "passes", "read again"],
            [
                [row.source, row.language, f"{row.source_tokens:,}", f"{row.tokens:,}", f"{row.share:.2%}",
                 f"{row.passes:.2f}", f"{row.repeated_tokens:,}"]
                for row in rows
            ],
        )  # fmt: skip
        print("Languages: " + ", ".join(f"{language} {share:.2%}" for language, share in _languages(rows).items()))
    print(f"Sizes: {origin}. Tokens are positions of rows, padding included.")
