"""`rxt-dist data build`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer

from rxt_dist.commands.data.common import INPUTS, JSON, emit, print_summary, progress_bytes, say, summary


def build(
    inputs: list[Path] = INPUTS,
    out: Path = typer.Option(..., help="Folder of the dataset; an interrupted build is finished by running it again."),
    tokenizer: Path | None = typer.Option(None, help="A tokenizer.json; without it one is trained on the inputs."),
    seq_len: int = typer.Option(256, help="Tokens a row: the sequence length you will train with."),
    vocab_size: int = typer.Option(4096, help="Ids of the tokenizer that is trained when none is given."),
    workers: int = typer.Option(os.cpu_count() or 1, help="Processes; changes the speed, never the result."),
    eval_fraction: float = typer.Option(0.02, help="Share of the documents held out, chosen by hash of their text."),
    as_json: bool = JSON,
) -> None:
    """Tokenise and pack text into shards that training reads.

    Example: `rxt-dist data build my_texts/ --out data/mine --seq-len 512`. The language of a text is its `language`
    field, or a folder or file name such as `pl/` or `stories.pl.jsonl`; each language becomes a source that can be
    weighted in the mixture and is evaluated by itself.
    """
    from data_prep.build import BuildRequest, build_dataset

    started = time.monotonic()
    request = BuildRequest(
        inputs=tuple(inputs),
        out=out,
        tokenizer=tokenizer,
        seq_len=seq_len,
        vocab_size=vocab_size,
        eval_fraction=eval_fraction,
        workers=workers,
    )
    with progress_bytes("Building") as progress:
        result = build_dataset(request, say, progress)
    seconds = time.monotonic() - started
    value = summary(out, result.manifest) | {
        "read": vars(result.counts),
        "units": result.units,
        "units_kept": result.units_kept,
        "seconds": round(seconds, 3),
    }

    def show() -> None:
        print_summary(out, result.manifest)
        read = result.counts
        print(
            f"Read {read.documents:,} documents; skipped {read.empty} empty and {read.not_text} that are not text; "
            f"mended invalid UTF-8 in {read.repaired_utf8}. {result.units_kept} of {result.units} units were already "
            f"finished. {seconds:.1f} s."
        )
        if result.units_kept:
            print(f"Finished units are recognised by their sizes; `rxt-dist data verify {out}` reads their contents.")

    emit(as_json, value, show)
