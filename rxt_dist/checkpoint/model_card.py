"""The page that goes with exported weights: what they are, what they were trained on, and how they did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rxt_dist.checkpoint.store import Checkpoint
from rxt_dist.config.run import RunConfig
from rxt_dist.data.manifest import DATASET_FILE
from rxt_dist.model.count import count_parameters, count_system

_LICENCE = """The weights are those of whoever trained them, who has to name a licence here. The Reactive Transformer
architecture is patent-pending (application P.453260), and its owners license its use (RAML). The texts that the
weights were trained on have licences of their own."""


def model_card(run: Path, config: RunConfig, checkpoint: Checkpoint, parts: list[str], usage: str) -> str:
    """Markdown of a model card.

    Args:
        parts: that the export holds.
        usage: how these files are loaded.
    """
    meta = checkpoint.meta
    sections = [
        f"---\nlibrary_name: rxt_dist\ntags: [reactive-transformer]\n---\n\n# {config.name}",
        f"A Reactive Transformer ({config.model.name}): {', '.join(part.replace('_', ' ') for part in parts)}.",
        "## Parameters",
        _table(("part", "parameters", "active per token"), _parameters(config)),
        "## Training",
        f"Stage `{config.stage.kind}`, step {checkpoint.step:,}, {meta.get('tokens', 0):,} tokens of positions, "
        f"run {meta.get('run_id', 'unknown')}, precision {config.train.precision}.{_origin(meta)}",
        *_data(config),
        *_figures(run),
        "## Licence",
        _LICENCE,
        "## Use",
        usage,
    ]
    return "\n\n".join(sections) + "\n"


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _parameters(config: RunConfig) -> list[tuple[str, ...]]:
    counts = count_parameters(config.model) | {"system, one embedding": count_system(config.model)}
    return [
        (part.replace("_", " "), f"{count.total:,}", f"{count.active:,}")
        for part, count in counts.items()
        if count.total
    ]


def _origin(meta: dict[str, Any]) -> str:
    origin = meta.get("origin")
    if not origin:
        return ""
    return f" It began with the weights of {', '.join(origin['parts'])} from `{origin['path']}`."


def _data(config: RunConfig) -> Iterator[str]:
    """What the dataset says of itself, if it is still there."""
    try:
        manifest = json.loads((config.data.path / DATASET_FILE).read_text(encoding="utf-8"))
        rows = [
            (source["name"], source["language"], f"{source['train']['totals']['tokens']:,}")
            for source in manifest["sources"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        yield f"Dataset: `{config.data.path}`, which is not there any more."
        return
    yield f"Dataset `{config.data.path}`, digest `{manifest.get('root_digest', '')[:16]}`:"
    yield _table(("source", "language", "tokens"), rows)


def _figures(run: Path) -> Iterator[str]:
    """The last evaluation of each source and view."""
    yield "## Figures"
    figures: dict[str, Any] = {}
    step = None
    for line in _lines(run / "metrics.jsonl"):
        found = {name: value for name, value in line.items() if name.startswith("eval/")}
        if found:
            figures, step = found, line.get("step")
    if not figures:
        yield "None: the run was not evaluated."
        return
    yield f"On held-out rows, at step {step}; losses in nats a target."
    yield _table(("figure", "value"), [(name.removeprefix("eval/"), f"{value:.4g}") for name, value in figures.items()])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of a log; a torn one tells nothing."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            yield line
