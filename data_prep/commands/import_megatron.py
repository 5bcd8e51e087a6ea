"""`rxt-dist data import-megatron`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_prep.commands.common import (
    JSON,
    TASK,
    TASKS,
    WORKERS,
    emit,
    emit_unfinished,
    print_summary,
    progress_units,
    say,
    summary,
)

if TYPE_CHECKING:
    from data_prep.megatron.importing import ImportResult
    from rxt_dist.data.manifest import DatasetManifest


def import_megatron(
    prefix: Path = typer.Argument(..., help="PREFIX of PREFIX.bin and PREFIX.idx."),
    out: Path = typer.Option(..., help="Folder of the dataset; an interrupted import is finished by running it again."),
    tokenizer: Path = typer.Option(..., help="The tokenizer.json that made the ids."),
    seq_len: int = typer.Option(..., help="Tokens a row: the sequence length you will train with."),
    language: str | None = typer.Option(
        None, help="Language of the text; default: as an export of this program states it, else by the name, else und."
    ),
    source: str | None = typer.Option(
        None, help="Name of the source in mixtures; default: as an export states it, else the language."
    ),
    eod: int | None = typer.Option(None, help="Id that ends documents and is taken off; default: that of [EOS]."),
    eval_fraction: float = typer.Option(0.02, help="Share of the documents held out, chosen by hash of their ids."),
    workers: int = WORKERS,
    task: int | None = TASK,
    tasks: int | None = TASKS,
    as_json: bool = JSON,
) -> None:
    """Turn a corpus that Megatron's tools tokenised into shards, without tokenising it again.

    Example: `rxt-dist data import-megatron corpus_text_document --tokenizer tokenizer.json --seq-len 8192 --out
    data/corpus`. A [BOS] that begins a document and an [EOS] (or --eod) that ends it are taken off, and put back by
    packing. What `export-megatron` wrote keeps its source and language, which PREFIX.rxt.json states.

    Workers share the corpus in parts of 256 MiB. As a job array, on nodes that share the folder: add `--task
    $SLURM_ARRAY_TASK_ID --tasks 64`; the task that ends last finishes the dataset.
    """
    from dataclasses import asdict

    from data_prep.megatron.description import name_documents
    from data_prep.megatron.importing import ImportRequest, import_megatron

    naming = name_documents(prefix, source, language)
    if naming.said:
        say(naming.said)
    request = ImportRequest(
        prefix=prefix,
        out=out,
        tokenizer=tokenizer,
        seq_len=seq_len,
        language=naming.language,
        source=naming.source,
        eod=eod,
        eval_fraction=eval_fraction,
        workers=workers,
        task=task,
        tasks=tasks,
    )
    with progress_units() as progress:
        result = import_megatron(request, say, progress)
    manifest = result.manifest
    if manifest is None:
        emit_unfinished(as_json, out, result)
        return
    told = {"read": asdict(result.counts), "naming": naming.said}
    value = summary(out, manifest) | told | {"units": result.units, "units_kept": result.units_kept}

    emit(as_json, value, lambda: _show(out, manifest, result))


def _show(out: Path, manifest: DatasetManifest, result: ImportResult) -> None:
    print_summary(out, manifest)
    read = result.counts
    print(
        f"Took over {read.documents:,} documents, skipped {read.empty:,} empty; took off {read.bos:,} [BOS] and "
        f"{read.eod:,} ends of document. {result.units_kept} of {result.units} units were already finished."
    )
