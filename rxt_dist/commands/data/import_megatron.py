"""`rxt-dist data import-megatron`."""

from __future__ import annotations

from pathlib import Path

import typer

from rxt_dist.commands.data.common import JSON, emit, print_summary, progress_bytes, summary


def import_megatron(
    prefix: Path = typer.Argument(..., help="PREFIX of PREFIX.bin and PREFIX.idx."),
    out: Path = typer.Option(..., help="Folder of the dataset; an interrupted import is finished by running it again."),
    tokenizer: Path = typer.Option(..., help="The tokenizer.json that made the ids."),
    seq_len: int = typer.Option(..., help="Tokens a row: the sequence length you will train with."),
    language: str | None = typer.Option(None, help="Language of the text; default: from the file's name, else und."),
    source: str | None = typer.Option(None, help="Name of the source in mixtures; default: the language."),
    eod: int | None = typer.Option(None, help="Id that ends documents and is taken off; default: that of [EOS]."),
    eval_fraction: float = typer.Option(0.02, help="Share of the documents held out, chosen by hash of their ids."),
    as_json: bool = JSON,
) -> None:
    """Turn a corpus that Megatron's tools tokenised into shards, without tokenising it again.

    Example: `rxt-dist data import-megatron corpus_text_document --tokenizer tokenizer.json --seq-len 8192 --out
    data/corpus`. A [BOS] that begins a document and an [EOS] that ends it are taken off, and put back by packing; to
    take off another end of document, name it with `--eod`.
    """
    from dataclasses import asdict

    from data_prep.languages import language_of_name
    from data_prep.megatron.importing import ImportRequest, import_megatron

    tag = language or language_of_name(f"{prefix.parent.name}/{prefix.name}.bin") or "und"
    request = ImportRequest(
        prefix=prefix,
        out=out,
        tokenizer=tokenizer,
        seq_len=seq_len,
        language=tag,
        source=source or tag,
        eod=eod,
        eval_fraction=eval_fraction,
    )
    with progress_bytes("Importing") as progress:
        result = import_megatron(request, progress)
    value = summary(out, result.manifest) | {
        "read": asdict(result.counts),
        "units": result.units,
        "units_kept": result.units_kept,
    }

    def show() -> None:
        print_summary(out, result.manifest)
        read = result.counts
        print(
            f"Took over {read.documents:,} documents, skipped {read.empty:,} empty; took off {read.bos:,} [BOS] and "
            f"{read.eod:,} ends of document. {result.units_kept} of {result.units} units were already finished."
        )

    emit(as_json, value, show)
