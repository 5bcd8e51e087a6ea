"""From records to interactions."""

from __future__ import annotations

import datetime
import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from data_prep import synthetic
from data_prep.corpora import Document
from data_prep.interactions import build as interaction_build
from data_prep.interactions import reader
from data_prep.interactions import synthetic as synthetic_interactions
from data_prep.interactions.build import InteractionRequest, build_interactions
from data_prep.interactions.reader import Interaction, InteractionCounts, Record, find_record_files, read_records
from data_prep.readers import tables
from data_prep.readers.tables import rows_at_once
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from rxt_dist.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Path]:
    rng = random.Random(0)
    texts = [(synthetic.story(rng, language), language) for _ in range(40) for language in ("en", "pl")]
    trained = train_tokenizer((Document(text, language, language, "") for text, language in texts), 500)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(trained, path)
    return trained, path


def _write(path: Path, *records: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


def _read(path: Path) -> tuple[list[Record], InteractionCounts]:
    counts = InteractionCounts()
    return [item for file in find_record_files([path]) for item in read_records(file, counts)], counts


def _one(path: Path, *records: Any) -> list[Interaction]:
    (record,), _ = _read(_write(path, *records))
    return list(record.interactions)


def test_every_part_has_its_field(tmp_path: Path) -> None:
    call = {"tool": "clock", "zone": "Łódź"}
    one = {"query": "q", "thinking": "t", "answer": "a", "tool_call": call, "internal": "i", "other": 1}
    two = {"tool_result": ["1", 2], "think": "t2", "answer": "a2", "query": None}
    assert _one(tmp_path / "x.jsonl", {"interactions": [one, two]}) == [
        Interaction("q", "a", "t", '{"tool": "clock", "zone": "Łódź"}', "", "i"),
        Interaction("", "a2", "t2", "", '["1", 2]', ""),
    ]
    assert _one(tmp_path / "y.jsonl", one)[0].internal == "i"


def test_a_chat_becomes_interactions(tmp_path: Path) -> None:
    calls = [{"function": {"name": "f"}}, {"function": {"name": "g"}}]
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u1"},
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "r"},
        {"role": "tool", "content": "x"},
        {"role": "tool", "content": "y"},
        {"role": "assistant", "content": "a2", "tool_calls": []},
        {"role": "system", "content": "s2"},
        {"role": "user", "content": "u3"},
        {"role": "assistant", "content": "a3"},
        {"role": "user", "content": "nobody answers"},
    ]
    path = _write(tmp_path / "x.jsonl", {"messages": messages})
    (record,), counts = _read(path)
    assert list(record.interactions) == [
        Interaction("u1", "", "r", json.dumps(calls), "", "s"),
        Interaction("", "a2", "", "", "x\ny", ""),
        Interaction("u3", "a3", "", "", "", "s2"),
    ]
    assert (counts.records, counts.interactions, counts.unanswered, counts.empty) == (1, 3, 1, 0)


def _chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            _chat("user", "user"),
            r"'messages\[1\]' has role 'user' right after a user message that nothing has answered",
        ),
        (_chat("assistant"), r"'messages\[0\]' is an assistant message that answers nothing \(it is the first\)"),
        (_chat("user", "assistant", "assistant"), r"'messages\[2\]'.*answers nothing \(it follows another one\)"),
        (_chat("system", "assistant"), r"answers nothing \(it follows a system message\)"),
        (_chat("system", "system"), r"'messages\[1\]' has role 'system' right after a system message"),
        (_chat("user", "system", "assistant"), r"role 'system' right after a user message"),
        (_chat("tool", "assistant"), r"'messages\[0\]' is a tool's result, but no assistant message before it"),
        (_chat("user", "tool"), r"role 'tool' right after a user message"),
        (_chat("usr", "assistant"), r"'messages\[0\].role' is 'usr'; known are .* Did you mean 'user'"),
        ({"messages": ["hello"]}, r"'messages\[0\]' is a str; a message is an object"),
        ({"messages": [{"role": "user", "content": [1]}]}, r"'messages\[0\].content' is a list, not text"),
        ({"messages": {}}, "'messages' is a dict, not a list"),
        ({"messages": [], "interactions": []}, "both 'interactions' and 'messages'"),
        ({"query": 3, "answer": "x"}, "'query' is a int, not text"),
        ({"query": "x", "tool_result": "y", "answer": "z"}, "the record has both 'query' and 'tool_result'"),
        ({"interactions": [{"query": "x", "answer": ["y"]}]}, r"'interactions\[0\].answer' is a list, not text"),
        ({"interactions": ["x"]}, r"'interactions\[0\]' is a str; an interaction is an object"),
        ({"query": "x", "answer": "y", "think": "a", "thinking": "b"}, "'thinking' says 'think' a second time"),
        ({"query": "x", "answer": "y", "language": 7}, "'language' is a int, not text"),
        ({"prompt": "x", "completion": "y"}, r"holds no interaction: it has the fields \['completion', 'prompt'\]"),
        ("[1, 2]", "is a JSON list"),
        ('{"query": ', "is not JSON"),
    ],
)
def test_what_cannot_be_an_interaction_is_refused_by_file_line_and_field(
    tmp_path: Path, record: Any, message: str
) -> None:
    path = _write(tmp_path / "x.jsonl", {"query": "fine", "answer": "fine"}, "", record)
    with pytest.raises(DataError, match=message) as caught:
        _read(path)
    assert f"{path}, line 3" in str(caught.value)


def test_empty_records_are_skipped_and_counted(tmp_path: Path) -> None:
    whole = {"query": "q", "answer": "a"}
    records = [
        whole,
        {"query": "q", "answer": " "},
        {"query": None, "answer": "a"},
        {"query": "q", "think": "only thoughts"},
        {"interactions": []},
        {"interactions": [whole, {"query": "", "answer": "a"}]},
        {"messages": [{"role": "user", "content": "q"}]},
    ]
    read, counts = _read(_write(tmp_path / "x.jsonl", *records))
    assert len(read) == 1
    assert (counts.records, counts.empty, counts.unanswered) == (1, 6, 1)


def test_an_empty_call_is_no_call(tmp_path: Path) -> None:
    empty = [[], {}, [{}], {"name": None, "arguments": [None, {}]}, "[]", " {} ", "null", None, ""]
    calls = [{"query": "q", "answer": "a", "tool_call": call} for call in empty]
    chats = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": call}]}
        for call in empty
    ]
    alone = [{"query": "q", "tool_call": call} for call in empty]
    read, counts = _read(_write(tmp_path / "x.jsonl", *calls, *chats, *alone))
    assert [record.interactions for record in read] == [(Interaction("q", "a"),)] * 2 * len(empty)
    assert counts.empty == len(empty)
    kept = [{"name": "now", "zone": None}, {"name": "now", "arguments": {}}, [0], {"on": False}, [""]]
    for call in kept:
        assert _one(tmp_path / "y.jsonl", {"query": "q", "tool_call": call})[0].tool_call == json.dumps(call)
    # That a tool found nothing is something to answer.
    assert _one(tmp_path / "z.jsonl", {"tool_result": [], "answer": "None."})[0].tool_result == "[]"
    assert _one(tmp_path / "z.jsonl", {"tool_result": {}, "query": "q", "answer": "a"})[0].tool_result == ""


def test_fields_that_a_table_had_to_invent_are_not_kept(tmp_path: Path) -> None:
    """A column has one type: each struct has the fields of all, null where the record had none."""
    records = [
        {"interactions": [
            {"query": "q1", "answer": None, "tool_call": {"name": "clock", "zone": "Łódź", "at": {"h": None}}},
            {"query": None, "tool_result": {"time": "12"}, "answer": "12"},
        ]},
        {"interactions": [{"query": "q2", "answer": None, "tool_call": {"name": "dice", "sides": 6, "at": {"h": 1}}}]},
        {"interactions": [{"query": "q3", "answer": "a3", "tool_call": {"name": None}, "tool_result": {"time": None}}]},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "x.parquet")
    read, _ = _read(tmp_path / "x.parquet")
    assert [record.interactions for record in read] == [
        (Interaction("q1", "", "", '{"name": "clock", "zone": "Łódź", "at": {}}'),
         Interaction("", "12", "", "", '{"time": "12"}')),
        (Interaction("q2", "", "", '{"name": "dice", "at": {"h": 1}, "sides": 6}'),),
        (Interaction("q3", "a3"),),
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist([{"interactions": [{"query": None, "tool_call": {"name": None}}]}]),
                   tmp_path / "y.parquet")  # fmt: skip
    assert _read(tmp_path / "y.parquet")[1].empty == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "is not JSON .nested too deeply"),
        ("[" * 150 + "1" + "]" * 150, None),
        ("1" * 5000, None),
    ],
)
def test_monsters_of_json_are_read_or_refused_in_words(tmp_path: Path, value: str, message: str | None) -> None:
    path = _write(tmp_path / "x.jsonl", "{}", '{"query": "q", "tool_call": ' + value + "}")
    path.write_text(path.read_text().replace("{}\n", '{"query": "q", "answer": "a"}\n'))
    if message is None:
        assert _read(path)[0][1].interactions[0].tool_call == value
        return
    with pytest.raises(DataError, match=f"x.jsonl, line 2.*{message}"):
        _read(path)


def test_language_and_source_are_tags_then_names_then_guesses(tmp_path: Path) -> None:
    polish = "Czy to jest dom, który był dla niego, czy nie jest?"
    _write(tmp_path / "in/pl/a.jsonl", {"query": "x", "answer": "y"}, {"query": "x", "answer": "y", "lang": "en-GB"})
    _write(tmp_path / "in/b.jsonl", {"query": polish, "answer": "się nie"},
           {"query": "x", "answer": "y", "language": "pl", "source": "../My Chats!"})  # fmt: skip
    read, _ = _read(tmp_path / "in")
    assert [(record.language, record.source) for record in read] == [
        ("pl", "pl"), ("pl", "my-chats-pl"), ("pl", "pl"), ("en", "en"),
    ]  # fmt: skip


def test_lone_surrogates_are_mended_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"query": "a\xff", "answer": "b\\ud800"}\n{"query": "\xc4\x85", "answer": "c"}\n')
    read, counts = _read(path)
    assert [(r.interactions[0].query, r.interactions[0].answer) for r in read] == [("a\ufffd", "b\ufffd"), ("ą", "c")]
    assert counts.repaired_utf8 == 1


def test_large_records_of_a_table_are_read_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.en.parquet"
    chats = [[{"query": "a" * 100_000, "answer": str(n)}] for n in range(300)]
    pq.write_table(pa.table({"interactions": chats, "other": ["b" * 10_000] * 300}), path, row_group_size=150)
    asked = []

    def noting(table: pq.ParquetFile, file: Any, group: int, columns: list[str]) -> int:
        asked.append((group, rows_at_once(table, file, group, columns)))
        return asked[-1][1]

    monkeypatch.setattr(tables, "_DECODED_BYTES", 1_000_000)
    monkeypatch.setattr(tables, "rows_at_once", noting)
    assert [record.interactions[0].answer for record in _read(path)[0]] == [str(n) for n in range(300)]
    assert [group for group, _ in asked] == [0, 1]
    assert all(1 <= rows <= 10 for _, rows in asked)


def test_a_line_that_no_record_can_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_RECORD_BYTES", 1000)
    fits = {"query": "q", "answer": "a" * 900}
    assert len(_read(_write(tmp_path / "a.jsonl", fits, fits))[0]) == 2
    path = _write(tmp_path / "b.jsonl", fits, {"query": "q", "answer": "a" * 1000})
    with pytest.raises(DataError, match=r"b\.jsonl, line 2 is longer than"):
        _read(path)


def test_a_file_that_is_edited_while_it_is_built_from_is_refused(
    tmp_path: Path, tokenizer: tuple[Tokenizer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _write(tmp_path / "x.en.jsonl", *({"query": f"q{n}", "answer": "a"} for n in range(20)))
    inner = interaction_build.read_records

    def editing(*arguments: Any) -> Any:
        path.write_text(path.read_text().replace("q3", "q4"))
        return inner(*arguments)

    monkeypatch.setattr(interaction_build, "read_records", editing)
    with pytest.raises(DataError, match=r"x\.en\.jsonl was changed while the dataset was built"):
        build_interactions(InteractionRequest((path,), tmp_path / "out", tokenizer[1], 64))
    assert list((tmp_path / "out" / "units").glob("*.json")) == []


def test_packed_lines_and_parquet_give_the_same_records(tmp_path: Path) -> None:
    rng = random.Random(3)
    records = [synthetic_interactions.dialogue(rng, "pl") | {"language": "pl"} for _ in range(5)]
    for record in records:  # a column of a table has one type
        for item in record["interactions"]:
            item["tool_call"] = json.dumps(item["tool_call"]) if "tool_call" in item else None
    plain = _write(tmp_path / "a.jsonl", *records)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    with pa.CompressedOutputStream(str(tmp_path / "c.jsonl.zst"), "zstd") as stream:
        stream.write(plain.read_bytes())
    table = pa.Table.from_pylist(records)
    pq.write_table(table, tmp_path / "d.parquet", row_group_size=2)
    for name, new in (("e.arrow", pa.ipc.new_file), ("f.arrow", pa.ipc.new_stream)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    expected = [(record.interactions, record.language) for record in _read(plain)[0]]
    assert len(expected) == 5
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.parquet", "e.arrow", "f.arrow"):
        read = _read(tmp_path / name)[0]
        assert [(record.interactions, record.language) for record in read] == expected
        assert read[4].place.endswith(f"{name}, {'line' if 'jsonl' in name else 'row'} 5")


def _as_text(values: list[bytes]) -> pa.Array:
    """Bytes that claim to be UTF-8."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def test_invalid_utf8_in_tables_is_mended_in_any_depth(tmp_path: Path) -> None:
    texts = _as_text([b"a\xff", "ą".encode()])
    answers = pa.array(["b", "c"])
    flat = pa.table({"query": texts, "answer": answers})
    single = pa.StructArray.from_arrays([texts, answers, pa.array([None, "t"])], ["query", "answer", "think"])
    nested = pa.table({"interactions": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), single)})
    for name, table in (("flat", flat), ("nested", nested)):
        pq.write_table(table, tmp_path / f"{name}.parquet")
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), table.schema) as writer:
            writer.write_table(table)
        for suffix in ("parquet", "arrow"):
            read, counts = _read(tmp_path / f"{name}.{suffix}")
            assert [record.interactions[0].query for record in read] == ["a\ufffd", "ą"]
            assert [record.interactions[0].think for record in read] == ["", "t" if name == "nested" else ""]
            assert counts.repaired_utf8 == 1


@pytest.mark.slow
def test_texts_that_a_dictionary_holds_are_held_once(tmp_path: Path) -> None:
    queries = pa.array(["q" * 3_000_000, "r"] * 40).dictionary_encode()
    table = pa.table({"query": queries, "answer": [str(number) for number in range(80)]})
    pq.write_table(table, tmp_path / "x.en.parquet")
    with pa.ipc.new_file(str(tmp_path / "x.en.arrow"), table.schema) as writer:
        writer.write_table(table)
    for name in ("x.en.parquet", "x.en.arrow"):
        tracemalloc.start()
        answers = [record.interactions[0].answer for (file,) in [find_record_files([tmp_path / name])]
                   for record in read_records(file, InteractionCounts())]  # fmt: skip
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert answers == [str(number) for number in range(80)]
        assert peak < 60_000_000  # of 120 MB of text


def test_a_column_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["q"])] * 2 + [pa.array(["a"])], names=["query", "query", "answer"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet has more than one column 'query'"):
        _read(tmp_path / "x.parquet")


def test_files_that_are_not_what_they_seem_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"query": "q" * 5000, "answer": "a"}).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-9])
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "documents.parquet")
    (tmp_path / "x.txt").write_text("text")
    chat = [{"from": "human", "value": "q"}]
    pq.write_table(pa.Table.from_pylist([{"conversations": chat, "source": "x"}]), tmp_path / "renamed.parquet")
    pq.write_table(pa.Table.from_pylist([{"messages": chat, "source": "x"}]), tmp_path / "roles.parquet")
    dated = [{"query": "q", "tool_call": {"at": datetime.date(2020, 1, 1)}}]
    pq.write_table(pa.Table.from_pylist(dated), tmp_path / "dated.parquet")
    for name, message in (
        ("cut.jsonl.gz", "is damaged, cut off or not readable"),
        ("cut.parquet", "cannot be read as a table"),
        ("documents.parquet", r"has none of the columns query, .*: it has the columns \['text'\]"),
        ("renamed.parquet", r"it has the columns \['conversations', 'source'\]. Needed are .* or 'messages'; rename"),
        (
            "roles.parquet",
            r"'messages\[0\]' has the fields \['from', 'value'\]; a message needs 'role' \(system, .*content",
        ),
        ("x.txt", "cannot hold interactions"),
        ("none.jsonl", "does not exist"),
        ("dated.parquet", "row 1: 'tool_call' cannot be kept as JSON"),
    ):
        with pytest.raises(DataError, match=f"{name}.*{message}"):
            _read(tmp_path / name)


def test_lines_and_names_are_read_as_leniently_as_those_of_documents(tmp_path: Path) -> None:
    record = b'{"query": "x", "answer": "y", "lang": "pol_Latn", "id": ' + b"9" * 5000 + b"}\n"
    (tmp_path / "A.JSONL").write_bytes(b"\xef\xbb\xbf\n" + record)
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(record))
    read, _ = _read(tmp_path)
    assert [(record.language, record.source) for record in read] == [("pl", "pl"), ("pl", "pl")]
