"""What a dialogue recalls, from a record to the shard: distance, and the tokens that hold the value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import golden_inputs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.interactions.recalls import SpanFinder
from data_prep.tokenizing.tokenizer import load_tokenizer
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.errors import DataError

TELL = {"query": "My dog is called Żurek.", "answer": "I see."}
OTHER = {"query": "It is raining.", "answer": "Then stay inside."}
ASK = {"query": "What is my dog called?", "answer": "Your dog is called Żurek.",
       "recall": {"distance": 2, "value": "Żurek"}}  # fmt: skip
PLAIN = {"interactions": [TELL, OTHER], "language": "en"}
ASKED = {"interactions": [TELL, OTHER, ASK], "language": "en"}


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    path.write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    return path


def build(tokenizer: Path, records: list[Any], seq_len: int = 64, name: str = "chats", **options: Any) -> Path:
    root = tokenizer.parent
    (root / f"{name}.jsonl").write_bytes(golden_inputs.lines(records))
    options = {"kind": "dialogues", "workers": 1, "eval_fraction": 0.0} | options
    build_interactions(InteractionRequest((root / f"{name}.jsonl",), root / name, tokenizer, seq_len, **options))
    return root / name


def said(tokenizer: Path, root: Path, index: int, split: str = "train") -> list[tuple[int, str]]:
    """(distance, text of the tokens) of each turn that recalls something."""
    data, text = DialogueDataset(root, split), load_tokenizer(tokenizer)
    return [
        (distance, text.decode(turn[first:end].tolist()).strip())
        for turn, (distance, first, end) in zip(data.dialogue(index), data.recalls(index).tolist(), strict=True)
        if distance
    ]


@pytest.mark.parametrize("template", ["alpha", "beta"])
def test_the_tokens_of_a_value_are_found_whatever_stands_around_it(tokenizer: Path, template: str) -> None:
    """Behind thinking, before a tool call, after a query that was shortened, and next to a mark."""
    long = {**ASK, "query": "Tell me. " * 20 + ASK["query"]}
    busy = {**ASK, "think": "I was told Żurek.", "internal": "Be brief.", "tool_call": {"name": "Żurek"}}
    first = {**ASK, "answer": "Żurek, of course."}
    records = [{"interactions": [TELL, OTHER, ask], "language": "en"} for ask in (ASK, long, busy, first)]
    root = build(tokenizer, records, 96, template=template)
    for index in range(4):
        assert said(tokenizer, root, index) == [(2, "Żurek")]
    assert DialogueDataset(root).recalls(0)[:2].tolist() == [[0, 0, 0], [0, 0, 0]]


def test_a_dataset_has_the_column_only_where_something_is_recalled(tokenizer: Path) -> None:
    plain = build(tokenizer, [PLAIN] * 3, name="plain")
    mixed = build(tokenizer, [PLAIN] * 3 + [ASKED, PLAIN], name="mixed")
    columns = [pa.ipc.open_file(path).schema.names for path in sorted(mixed.rglob("*.arrow"))]
    assert columns == [["tokens", "turn_len"], ["tokens", "turn_len", "recall"]]
    assert (plain / "en/train/u00000-000.arrow").stat().st_size
    data = DialogueDataset(mixed)
    assert len(data) == 5
    assert [data.recalls(index).any() for index in range(5)] == [False, False, False, True, False]
    assert [data.recalls(index).shape for index in range(5)] == [(2, 3)] * 3 + [(3, 3), (2, 3)]
    assert DialogueDataset(plain).recalls(0).tolist() == [[0, 0, 0]] * 2


def test_recalls_in_a_table_are_structs_with_nulls(tokenizer: Path) -> None:
    root = tokenizer.parent
    pq.write_table(pa.Table.from_pylist([ASKED, PLAIN]), root / "chats.parquet")
    request = InteractionRequest((root / "chats.parquet",), root / "out", tokenizer, 64, "dialogues", eval_fraction=0)
    build_interactions(request)
    assert said(tokenizer, root / "out", 0) == [(2, "Żurek")]
    assert not DialogueDataset(root / "out").recalls(1).any()


def test_a_single_interaction_may_say_anything_of_recall(tokenizer: Path) -> None:
    """There it is a field that nobody reads; in a list of interactions it has a meaning."""
    build(tokenizer, [{**TELL, "recall": 0.93, "language": "en"}] * 2, kind="single")


@pytest.mark.parametrize(
    ("recall", "message"),
    [
        ("Żurek", "it is {'distance': turns since it was told, 'value': what the answer holds}"),
        ({"distance": 2}, "it is {'distance'"),
        ({"distance": "2", "value": "Żurek"}, "a whole number and a text"),
        ({"distance": True, "value": "Żurek"}, "a whole number and a text"),
        ({"distance": 2, "value": ""}, "a whole number and a text"),
        ({"distance": 3, "value": "Żurek"}, "has distance 3, but 2 turns lie before this one"),
        ({"distance": 0, "value": "Żurek"}, "has distance 0, but 2 turns lie before this one"),
        (
            {"distance": 2, "value": "Rex"},
            "the value 'Rex', which the answer 'Your dog is called Żurek.' holds 0 times",
        ),
        ({"distance": 2, "value": "o"}, "holds 2 times instead of once"),
    ],
)
def test_a_recall_that_cannot_be_ends_the_reading(tokenizer: Path, recall: Any, message: str) -> None:
    bad = {"interactions": [TELL, OTHER, {**ASK, "recall": recall}], "language": "en"}
    with pytest.raises(DataError) as caught:
        build(tokenizer, [ASKED, bad])
    assert message in str(caught.value)
    assert "chats.jsonl, line 2: 'interactions[2].recall'" in str(caught.value)
    assert not (tokenizer.parent / "chats/dataset.json").exists()


def test_what_is_held_out_is_never_trained_on(tokenizer: Path) -> None:
    root = build(tokenizer, [{**ASKED, "held_out": True}] * 3 + [{**PLAIN, "source": "talk", "held_out": False}] * 2)
    assert (len(DialogueDataset(root, "train", "en")), len(DialogueDataset(root, "eval", "en"))) == (0, 3)
    assert (len(DialogueDataset(root, "train", "talk-en")), len(DialogueDataset(root, "eval", "talk-en"))) == (2, 0)
    with pytest.raises(DataError, match=r"'held_out' is 'yes', not true or false"):
        build(tokenizer, [{**ASKED, "held_out": "yes"}], name="bad")


def test_the_tokens_of_a_character_are_all_of_it(tokenizer: Path) -> None:
    """A byte-level token may be half of a letter."""
    finder, text = SpanFinder(tokenizer), load_tokenizer(tokenizer)
    for value in ("ź", "źr", "漢", "x"):
        sentence = f"To jest {value}, tak."
        ids = text.encode(sentence, add_special_tokens=False).ids
        first, end = finder.span(sentence, value, len(ids))
        assert text.decode(ids[first:end]).strip() == value
