"""Records of others: fields under their own names, in lines and tables of every encoding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import golden_inputs
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.interactions.columns import Columns
from data_prep.interactions.reader import InteractionCounts, Record, find_record_files, read_records
from rxt_dist.data.dialogues import DialogueDataset
from rxt_dist.errors import ConfigError, DataError


def read(path: Path, *columns: str) -> list[Record]:
    return [record for file in find_record_files([path])
            for record in read_records(file, InteractionCounts(), Columns.parse(columns))]  # fmt: skip


def parts(records: list[Record]) -> list[list[tuple[str, str]]]:
    return [[(item.query, item.answer) for item in record.interactions] for record in records]


def write(path: Path, records: list[dict[str, Any]], kind: str, dictionaries: bool = False) -> Path:
    """The records as lines or as a table; with `dictionaries` every text column at the top is encoded as one."""
    path = path / f"records.{kind}"
    if kind == "jsonl":
        path.write_bytes(golden_inputs.lines(records))
        return path
    table = pa.Table.from_pylist(records)
    if dictionaries:
        columns = [of.dictionary_encode() if pa.types.is_string(of.type) else of for of in table.columns]
        table = pa.table(dict(zip(table.column_names, columns, strict=True)))
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=2)
    else:
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return path


KINDS = [("jsonl", False), ("parquet", False), ("arrow", False), ("parquet", True), ("arrow", True)]


@pytest.mark.parametrize(("kind", "dictionaries"), KINDS)
def test_single_interactions_under_other_names(tmp_path: Path, kind: str, dictionaries: bool) -> None:
    """What stands under our own name is not read where another column is named for it."""
    one = {"question": "One?", "response": "First.", "why": "Count.", "tag": "pl", "answer": "no", "from": "A b"}
    two = {"question": "Two?", "response": "Second.", "why": None, "tag": None, "answer": "no", "from": None}
    rows = [one, two, {**one, "answer": None}]
    given = ("query=question", "answer=response", "think=why", "language=tag", "source=from")
    records = read(write(tmp_path, rows, kind, dictionaries), *given)
    assert parts(records) == [[("One?", "First.")], [("Two?", "Second.")], [("One?", "First.")]]
    assert [record.interactions[0].think for record in records] == ["Count.", "", "Count."]
    assert [record.source for record in records][::2] == ["a-b-pl"] * 2


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_lists_of_interactions_and_of_messages_under_other_names(tmp_path: Path, kind: str) -> None:
    first = {"human_says": "Hi.", "bot_says": "Hello.", "extra": 1}
    turns = [{"turns": [first, {"human_says": "Bye.", "bot_says": "See you."}]},
             {"turns": [{"human_says": "Well?", "bot_says": "Well."}]}]  # fmt: skip
    (tmp_path / "a").mkdir()
    given = ("interactions=turns", "query=human_says", "answer=bot_says")
    found = read(write(tmp_path / "a", turns, kind), *given)
    assert parts(found) == [[("Hi.", "Hello."), ("Bye.", "See you.")], [("Well?", "Well.")]]
    shared = [{"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi."},
                                 {"from": "gpt", "value": "Hello."}]}]  # fmt: skip
    (tmp_path / "b").mkdir()
    found = read(write(tmp_path / "b", shared, kind), "messages=conversations", "role=from", "content=value")
    assert parts(found) == [[("Hi.", "Hello.")]]
    assert found[0].interactions[0].internal == "Be kind."


def test_texts_in_structs_may_be_dictionaries_and_lists_large_or_fixed(tmp_path: Path) -> None:
    text = pa.array(["Hi.", "Bye.", "Hi.", "Bye."]).dictionary_encode()
    answers = pa.array(["Hello.", None, "Hello.", "See you."], pa.large_string())
    structs = pa.StructArray.from_arrays([text, answers], ["query", "answer"])
    lists = {
        "large": pa.LargeListArray.from_arrays(pa.array([0, 2, 4], pa.int64()), structs),
        "fixed": pa.FixedSizeListArray.from_arrays(structs, 2),
    }
    for name, column in lists.items():
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), pa.schema([("interactions", column.type)])) as writer:
            writer.write_batch(pa.record_batch([column], ["interactions"]))
        counts = InteractionCounts()
        (file,) = find_record_files([tmp_path / f"{name}.arrow"])
        assert parts(list(read_records(file, counts))) == [[("Hi.", "Hello."), ("Bye.", "See you.")]], name
        assert counts.empty == 1  # one of its turns has no answer


def test_many_small_files_are_one_unit_and_one_dataset(tmp_path: Path) -> None:
    """The same rows as of one file, under other names."""
    (tmp_path / "many").mkdir()
    for number in range(300):
        talk = [{"question": f"Say {number}.", "response": f"It is {number}."}] * 2
        record = {"interactions": talk, "language": "en"}
        (tmp_path / f"many/{number:03d}.jsonl").write_bytes(golden_inputs.lines([record]))
    renamed = [
        {"interactions": [{"query": f"Say {n}.", "answer": f"It is {n}."}] * 2, "language": "en"} for n in range(300)
    ]
    (tmp_path / "one.jsonl").write_bytes(golden_inputs.lines(renamed))
    (tmp_path / "tok.json").write_text(golden_inputs.tokenizer_json(), encoding="utf-8")
    columns = Columns.parse(("query=question", "answer=response"))
    results = []
    for name, given, names in (("a", "many", columns), ("b", "one.jsonl", Columns())):
        request = InteractionRequest((tmp_path / given,), tmp_path / name, tmp_path / "tok.json", 64, "dialogues",
                                     workers=1, columns=names)  # fmt: skip
        results.append(build_interactions(request))
    assert [result.units for result in results] == [1, 1]
    data = [DialogueDataset(tmp_path / name) for name in "ab"]
    assert len(data[0]) == len(data[1]) > 250
    for index in (0, 7, len(data[0]) - 1):
        assert [turn.tolist() for turn in data[0].dialogue(index)] == [
            turn.tolist() for turn in data[1].dialogue(index)
        ]
    other = InteractionRequest((tmp_path / "many",), tmp_path / "a", tmp_path / "tok.json", 64, "dialogues", workers=1)
    with pytest.raises(DataError, match="columns"):
        build_interactions(other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("query",), "--column is 'query'; it is FIELD=COLUMN, as query=question."),
        (("query=",), "--column is 'query='"),
        (("querry=q",), "--column names the field 'querry'; known are query, answer"),
        (("query=a", "query=b"), "--column names the field 'query' more than once"),
        (("query=a", "answer=a"), "--column names the column 'a' more than once"),
    ],
)
def test_names_that_cannot_be(given: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Columns.parse(given)


def test_a_table_without_a_column_that_was_named_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, [{"turns": [{"query": "q", "answer": "a"}], "text": "t"}], "parquet")
    with pytest.raises(DataError, match=r"has no column 'turn', which was asked for; it has \['turns', 'text'\]"):
        read(path, "interactions=turn")
    with pytest.raises(DataError, match=r"none of the columns .* or say which is which \(--column query=QUESTION\)"):
        read(path)


def test_our_own_name_of_a_renamed_field_is_no_other_way_to_say_it(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(
        golden_inputs.lines([{"q": "Mine?", "a": "Yes.", "why": "So.", "thinking": "no"}])
    )
    (record,) = read(tmp_path / "x.jsonl", "query=q", "answer=a", "think=why")
    assert record.interactions[0].think == "So."
    (tmp_path / "y.jsonl").write_bytes(golden_inputs.lines([{"query": "Mine?", "answer": "Yes."}]))
    with pytest.raises(DataError, match="holds no interaction"):
        read(tmp_path / "y.jsonl", "query=q", "answer=a")
