"""`rxt-dist data show`."""

from __future__ import annotations

from pathlib import Path

import typer

from rxt_dist.commands.data.common import DATASET, JSON, emit


def show(
    dataset: Path = DATASET,
    position: int = typer.Option(..., min=0, help="Global position: which row of the training order."),
    seed: int = typer.Option(0, help="Seed of the order."),
    as_json: bool = JSON,
) -> None:
    """Show the row that training reads at a global position, decoded, document by document.

    The order is that of a run without `data.mixture`, whose sources are mixed in proportion to their size. A position
    beyond the last row belongs to a later epoch.
    Example: `rxt-dist data show data/mine --position 0`.
    """
    import numpy as np

    from data_prep.tokenizer import load_tokenizer
    from rxt_dist.data.dataset import TokenDataset
    from rxt_dist.data.format import TOKENIZER_FILE
    from rxt_dist.data.sampler import GlobalOrder, Phase, proportional_weights

    opened = TokenDataset(dataset)
    sources = opened.order_sources()
    rows = [source.rows for source in sources]
    order = GlobalOrder(sources, [Phase(sum(rows) * opened.seq_len, proportional_weights(rows))], seed, opened.seq_len)
    source_N, row_N = order.rows(np.array([position]))
    source, row = int(source_N[0]), int(row_N[0])
    tokens = opened.read("train", source_N, row_N).tokens_NT[0].tolist()
    vocabulary = load_tokenizer(dataset / TOKENIZER_FILE)
    documents, at = [], 0
    for segment in opened.segments("train", source, row):
        text = vocabulary.decode(tokens[at : at + segment.length], skip_special_tokens=False)
        documents.append(vars(segment) | {"text": text})
        at += segment.length
    name = opened.sources[source].name
    epoch = position // sum(rows)
    value = {
        "position": position,
        "epoch": epoch,
        "source": name,
        "row": row,
        "padding": len(tokens) - at,
        "documents": documents,
    }

    def print_row() -> None:
        where = f"Position {position} (epoch {epoch}): row {row} of source {name}"
        print(f"{where}, {at} tokens and {len(tokens) - at} of padding")
        for number, document in enumerate(documents):
            print(f"\n--- segment {number}: {document['length']} tokens of document {document['document']}, "
                  f"from its token {document['offset']}")  # fmt: skip
            print(document["text"])

    emit(as_json, value, print_row)
