"""`rxt-dist data show`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from data_prep.commands.common import DATASET, JSON, emit
from data_prep.commands.order import order_of
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.config.run import RunConfig
    from rxt_dist.config.schedules import Step


def show(
    dataset: Path = DATASET,
    position: int | None = typer.Option(None, min=0, help="Global position: which row of the training order."),
    run: Path | None = typer.Option(None, help="A run file (its mixture and seed) or a data file (its mixture)."),
    seed: int | None = typer.Option(None, min=0, help="Seed of the order; default: the run's, else 0."),
    step: int | None = typer.Option(None, min=1, help="Instead of a position: the first row of a step of the run."),
    rank: int = typer.Option(0, min=0, help="With --step: the first row that this rank read."),
    ranks: int = typer.Option(1, min=1, help="With --step: ranks of the run."),
    ids: bool = typer.Option(False, "--ids", help="The token ids as well."),
    mlm: bool = typer.Option(False, "--mlm", help="What the encoder of the run saw: masked tokens as [MASK]."),
    trace: bool = typer.Option(False, "--trace", help="Read the source of each document again, and name its record."),
    as_json: bool = JSON,
) -> None:
    """Show exactly the row that training reads at a global position, decoded, document by document.

    Without --run the sources are mixed in proportion to their size, as by a run without `data.mixture`. A position
    beyond the last row belongs to a later epoch.

    Example: `rxt-dist data show data/mine --position 0`, or what step 120 of a run began with:
    `rxt-dist data show data/mine --run configs/run/mine.yaml --step 120`.
    """
    import numpy as np

    from data_prep.shards.rows import locate, unit_name
    from data_prep.tokenizing.tokenizer import load_tokenizer
    from rxt_dist.data.dataset import TokenDataset
    from rxt_dist.data.manifest import TOKENIZER_FILE, load_manifest

    order, read, config = order_of(dataset, load_manifest(dataset), run, seed)
    position = _position(position, step, rank, ranks, config, read.seq_len)
    source_R, row_R = order.rows(np.array([position]))
    called = read.sources[int(source_R[0])].name
    (of, source), row = read.own(int(source_R[0])), int(row_R[0])
    dataset, opened = of.path, TokenDataset(of.path)
    tokens = opened.read("train", np.array([source]), row_R).tokens_RT[0].tolist()
    segments = opened.segments("train", source, row)
    shard, shard_row = locate(opened.manifest, source, "train", row)
    unit = unit_name(shard)
    seen = _masked(tokens, position, config) if mlm else tokens
    vocabulary = load_tokenizer(dataset / TOKENIZER_FILE)
    origins = _origins(dataset, unit, [segment.document for segment in segments], trace)
    documents, at = [], 0
    for segment in segments:
        here = slice(at, at + segment.length)
        text = vocabulary.decode(seen[here], skip_special_tokens=False)
        entry = vars(segment) | {"text": text} | origins.get(segment.document, {})
        documents.append(entry | ({"ids": seen[here]} if ids else {}))
        at += segment.length
    info = opened.sources[source]
    value = {
        "position": position,
        "epoch": order.epoch(position),
        "dataset": str(dataset),
        "source": called,
        "language": info.language,
        "row": row,
        "shard": shard.file,
        "row_in_shard": shard_row,
        "unit": unit,
        "inputs": _inputs(dataset, unit),
        "padding": len(tokens) - at,
        "documents": documents,
    } | ({"step": _step_of(position, config, opened.seq_len)} if config else {})
    emit(as_json, value, lambda: _print(value))


def _position(
    position: int | None, step: int | None, rank: int, ranks: int, run: RunConfig | None, seq_len: int
) -> int:
    if (position is None) == (step is None):
        raise ConfigError("Give either --position or, for a run, --step.")
    if step is None:
        assert position is not None
        return position
    if run is None:
        raise ConfigError("--step needs --run with a run file: the size of a step is the run's.")
    if rank >= ranks:
        raise ConfigError(f"--rank is {rank}, but there are {ranks} ranks, counted from 0 (--ranks).")
    for number, taken in _steps(run, seq_len):
        if number == step:
            if taken.rows % ranks:
                raise ConfigError(f"Step {step} has {taken.rows} rows, which {ranks} ranks cannot share equally.")
            return taken.first + rank * (taken.rows // ranks)
    raise ConfigError(f"--step is {step}, but the run ends before it (train.total_tokens {run.train.total_tokens:,}).")


def _steps(run: RunConfig, seq_len: int) -> Iterator[tuple[int, Step]]:
    """Every step with its number, from 1."""
    from rxt_dist.config.schedules import steps

    return enumerate(steps(run.train, seq_len), start=1)


def _step_of(position: int, run: RunConfig, seq_len: int) -> int | None:
    """The step that read a position; None for one beyond the end of the run."""
    return next((number for number, taken in _steps(run, seq_len) if position < taken.end), None)


def _masked(tokens: list[int], position: int, run: RunConfig | None) -> list[int]:
    if run is None:
        raise ConfigError("--mlm needs --run with a run file: the share of masked tokens is the run's.")
    probability = getattr(run.stage, "mlm_probability", None)
    if probability is None:
        raise ConfigError(f"--mlm: stage '{run.stage.kind}' masks no tokens. Leave it out.")
    from rxt_dist.data.masking import masked_row

    return masked_row(tokens, position, run.seed, probability)


def _inputs(dataset: Path, unit: str) -> list[str]:
    """The files that the unit was read from, as far as the folder keeps its plan."""
    from data_prep.shards.trace import stored_unit

    found = stored_unit(dataset, unit)
    return list(dict.fromkeys(part.input.path for part in found.slices)) if found else []


def _origins(dataset: Path, unit: str, documents: list[int], trace: bool) -> dict[int, dict[str, Any]]:
    """For each document its record: `id`, and what it is called at its source. Empty unless asked for."""
    if not trace:
        return {}
    from data_prep.shards.trace import documents_of

    return {number: {"id": document.id} for number, document in documents_of(dataset, unit, documents).items()}


def _print(value: dict[str, Any]) -> None:
    used = sum(document["length"] for document in value["documents"])
    step = f", step {value['step']}" if value.get("step") else ""
    print(
        f"Position {value['position']} (epoch {value['epoch']}{step}): row {value['row']} of source {value['source']} "
        f"({value['language']}), {used} tokens and {value['padding']} of padding"
    )
    print(f"It is row {value['row_in_shard']} of {value['shard']} in {value['dataset']}; unit {value['unit']}", end="")
    inputs = value["inputs"]
    print(f" was read from {', '.join(inputs[:3])}{', ...' if len(inputs) > 3 else ''}" if inputs else "")
    for number, document in enumerate(value["documents"]):
        origin = f" ({document['id']})" if "id" in document else ""
        print(
            f"\n--- segment {number}: {document['length']} tokens of document {document['document']}{origin}, "
            f"from its token {document['offset']}"
        )
        print(document["text"])
        if "ids" in document:
            print("ids:", *document["ids"])
