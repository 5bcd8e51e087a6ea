"""What `rxt-dist data show` tells of a row of documents or single interactions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.commands.place import Place, inputs_of, read_from
from rxt_dist.errors import ConfigError

if TYPE_CHECKING:
    from rxt_dist.config.run import RunConfig


def row_at(place: Place, run: RunConfig | None, mlm: bool, ids: bool, trace: bool) -> dict[str, Any]:
    """The row as `--json` says it.

    Args:
        mlm: with masked tokens as [MASK], of `run`, which reads it at a position.
    """
    import numpy as np

    from data_prep.shards.rows import locate, unit_name
    from data_prep.tokenizing.tokenizer import load_tokenizer
    from rxt_dist.data.dataset import TokenDataset
    from rxt_dist.data.manifest import TOKENIZER_FILE

    opened = TokenDataset(place.dataset)
    tokens = opened.read(place.split, np.array([place.source]), np.array([place.row])).tokens_RT[0].tolist()
    segments = opened.segments(place.split, place.source, place.row)
    shard, shard_row = locate(opened.sources[place.source].split(place.split).shards, place.row)
    unit = unit_name(shard)
    seen = _masked(tokens, place.position, run) if mlm else tokens
    vocabulary = load_tokenizer(place.dataset / TOKENIZER_FILE)
    origins = _origins(place.dataset, unit, [segment.document for segment in segments], trace)
    documents, at = [], 0
    for segment in segments:
        here = slice(at, at + segment.length)
        text = vocabulary.decode(seen[here], skip_special_tokens=False)
        entry = vars(segment) | {"text": text} | origins.get(segment.document, {})
        documents.append(entry | ({"ids": seen[here]} if ids else {}))
        at += segment.length
    return place.value() | {
        "language": opened.sources[place.source].language,
        "shard": shard.file,
        "row_in_shard": shard_row,
        "unit": unit,
        "inputs": inputs_of(place.dataset, unit),
        "padding": len(tokens) - at,
        "documents": documents,
    }


def _masked(tokens: list[int], position: int | None, run: RunConfig | None) -> list[int]:
    if run is None:
        raise ConfigError("--mlm needs --run with a run file: the share of masked tokens is the run's.")
    probability = run.stage.masked_share()
    if probability is None:
        raise ConfigError(f"--mlm: stage '{run.stage.kind}' masks no tokens. Leave it out.")
    from rxt_dist.data.masking import masked_row

    assert position is not None, "a run reads its rows at positions"
    return masked_row(tokens, position, run.seed, probability)


def _origins(dataset: Path, unit: str, documents: list[int], trace: bool) -> dict[int, dict[str, Any]]:
    """For each document its record: `id`, and what it is called at its source. Empty unless asked for."""
    if not trace:
        return {}
    from data_prep.shards.trace import documents_of

    return {number: {"id": document.id} for number, document in documents_of(dataset, unit, documents).items()}


def print_row(place: Place, value: dict[str, Any]) -> None:
    """The same for a person."""
    used = sum(document["length"] for document in value["documents"])
    print(f"{place.words('row')} ({value['language']}), {used} tokens and {value['padding']} of padding")
    print(
        f"It is row {value['row_in_shard']} of {value['shard']} in {value['dataset']}; unit {value['unit']}"
        f"{read_from(value['inputs'])}"
    )
    for number, document in enumerate(value["documents"]):
        origin = f" ({document['id']})" if "id" in document else ""
        print(
            f"\n--- segment {number}: {document['length']} tokens of document {document['document']}{origin}, "
            f"from its token {document['offset']}"
        )
        print(document["text"])
        if "ids" in document:
            print("ids:", *document["ids"])
