"""`rxt-dist data export-megatron`."""

from __future__ import annotations

from pathlib import Path

import typer

from data_prep.commands.common import DATASET, JSON, emit, print_table, progress_bytes
from rxt_dist.errors import ConfigError


def export_megatron(
    dataset: Path = DATASET,
    out: str = typer.Option(..., help="PREFIX; each source and split becomes PREFIX-SOURCE-SPLIT.bin and .idx."),
    as_json: bool = JSON,
) -> None:
    """Write a dataset's documents as Megatron's .bin and .idx.

    Example: `rxt-dist data export-megatron data/mine --out exported/mine` writes `exported/mine-en-train.bin` and
    `.idx`, and so on, each pair with a `.rxt.json` that tells `import-megatron` its source and language. Documents are
    whole again, in the order of the corpus, with their [BOS] and [EOS].
    """
    from data_prep.megatron.exporting import export_megatron

    # A Path forgets the slash that says "a folder", and the files would stand beside it.
    if out.endswith("/"):
        raise ConfigError(f"--out is '{out}', which names a folder. Add a beginning of file names: {out}corpus.")
    prefix = Path(out)
    with progress_bytes("Exporting") as progress:
        exported = export_megatron(dataset, prefix, progress)
    corpora = {
        str(item.prefix): {
            "source": item.source, "split": item.split, "documents": item.documents, "tokens": item.tokens
        }
        for item in exported
    }  # fmt: skip

    def show() -> None:
        rows = [[item.prefix.name, f"{item.documents:,}", f"{item.tokens:,}"] for item in exported]
        print_table(f"Written to {prefix.parent}, ids as uint16", ["prefix", "documents", "tokens"], rows)

    emit(as_json, {"dataset": str(dataset), "corpora": corpora}, show)
