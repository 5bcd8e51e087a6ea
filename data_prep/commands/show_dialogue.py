"""What `rxt-dist data show` tells of a dialogue."""

from __future__ import annotations

from typing import Any

from data_prep.commands.place import Place, inputs_of, read_from


def dialogue_at(place: Place, turns_read: int | None, ids: bool) -> dict[str, Any]:
    """The dialogue as `--json` says it, turn by turn; turns count from 1, as in evaluation.

    Args:
        turns_read: how many turns the stage of the run reads, if there is a run.
    """
    from data_prep.shards.rows import locate, unit_name
    from data_prep.tokenizing.tokenizer import load_tokenizer
    from rxt_dist.data.dialogues import DialogueDataset, load_dialogue_manifest
    from rxt_dist.data.manifest import TOKENIZER_FILE

    manifest = load_dialogue_manifest(place.dataset)
    info = manifest.sources[place.source]
    shard, in_shard = locate(info.split(place.split).shards, place.row)
    unit = unit_name(shard)
    opened = DialogueDataset(place.dataset, place.split, info.name)
    vocabulary = load_tokenizer(place.dataset / TOKENIZER_FILE)
    turns: list[dict[str, Any]] = []
    pairs = zip(opened.dialogue(place.row), opened.recalls(place.row).tolist(), strict=True)
    for number, (tokens_T, (distance, first, end)) in enumerate(pairs, start=1):
        tokens = tokens_T.tolist()
        turn = {"turn": number, "length": len(tokens), "text": vocabulary.decode(tokens, skip_special_tokens=False)}
        if distance:
            value = vocabulary.decode(tokens[first:end]).strip()
            turn["recall"] = {"distance": distance, "value": value, "first": first, "end": end}
        if turns_read is not None:
            turn["read"] = number <= turns_read
        turns.append(turn | ({"ids": tokens} if ids else {}))
    return place.value() | {
        "language": info.language,
        "shard": shard.file,
        "row_in_shard": in_shard,
        "unit": unit,
        "inputs": inputs_of(place.dataset, unit),
        "turns": turns,
    }


def print_dialogue(place: Place, value: dict[str, Any]) -> None:
    """The same for a person."""
    turns = value["turns"]
    tokens = sum(turn["length"] for turn in turns)
    print(f"{place.words('dialogue')} ({value['language']}), {len(turns)} turns of {tokens} tokens")
    print(
        f"It is dialogue {value['row_in_shard']} of {value['shard']} in {value['dataset']}; unit {value['unit']}"
        f"{read_from(value['inputs'])}"
    )
    for turn in turns:
        unread = "" if turn.get("read", True) else ", which the stage leaves out"
        print(f"\n--- turn {turn['turn']}: {turn['length']} tokens{unread}")
        print(turn["text"])
        if "recall" in turn:
            recall = turn["recall"]
            print(
                f">>> recalls {recall['value']!r} of turn {turn['turn'] - recall['distance']}, {recall['distance']} "
                f"before; tokens {recall['first']} to {recall['end'] - 1}"
            )
        if "ids" in turn:
            print("ids:", *turn["ids"])
