from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpora import Document, ReadCounts, find_files, guess_language, language_of_name, read_file
from rxt_dist.errors import DataError


def _read(*inputs: Path) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return [document for file in find_files(inputs) for document in read_file(file, counts)], counts


def _jsonl(*records: object) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def test_a_folder_with_every_format(tmp_path: Path) -> None:
    root = tmp_path / "texts"
    (root / "pl").mkdir(parents=True)
    (root / "pl" / "a.txt").write_text("Zażółć gęślą jaźń.")
    (root / "b.jsonl").write_bytes(_jsonl({"text": "one", "language": "en"}, {"text": "two", "language": "pl"}))
    (root / "c.en.jsonl.gz").write_bytes(gzip.compress(_jsonl({"content": "three"})))
    table = pa.table({"id": [1, 2], "text": ["four", None], "lang": ["de-AT", None]})
    pq.write_table(table, root / "d.parquet")
    with pa.ipc.new_file(str(root / "e.arrow"), table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(str(root / "f.arrow"), table.schema) as stream:
        stream.write_table(table)
    (root / ".hidden.txt").write_text("no")
    (root / "notes.md").write_text("no")
    documents, counts = _read(root)
    found = {(document.text, document.language) for document in documents}
    assert found == {("Zażółć gęślą jaźń.", "pl"), ("one", "en"), ("two", "pl"), ("three", "en"), ("four", "de")}
    assert counts == ReadCounts(documents=7, empty=3)
    assert all(document.source == document.language for document in documents)
    assert len({document.id for document in documents}) == 7
    assert {document.id for document in documents} >= {"texts/pl/a.txt#0", "texts/b.jsonl#0"}


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path: Path) -> None:
    ids = []
    for place in ("x", "y/z"):
        root = tmp_path / place / "texts"
        root.mkdir(parents=True)
        (root / "b.jsonl").write_bytes(_jsonl({"text": "one"}, {"text": "two"}))
        ids.append([document.id for document in _read(root)[0]])
    assert ids[0] == ids[1] == ["texts/b.jsonl#0", "texts/b.jsonl#16"]


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("texts/pl/x.txt", "pl"),
        ("texts/stories.pl.jsonl", "pl"),
        ("en/PL/x.txt", "pl"),
        ("pl/stories.en.jsonl.gz", "en"),
        ("texts/stories.jsonl", None),
    ],
)
def test_language_of_a_name(name: str, language: str | None) -> None:
    assert language_of_name(name) == language


def test_language_of_a_text() -> None:
    assert guess_language("It was the best of times, and they were with her in that house.") == "en"
    assert guess_language("To nie jest tak, że on się tego boi, ale już był czas.") == "pl"
    assert guess_language("1 2 3 lorem ipsum") == "und"


def test_bad_text_is_mended_or_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text " * 30 + b"\xff")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00\x80" * 50)
    (tmp_path / "c.txt").write_text(" \n\t ")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "' + b"x" * 200 + b'\\ud800"}\n\n{"text": ""}\n')
    documents, counts = _read(tmp_path)
    assert counts == ReadCounts(documents=3, empty=2, repaired_utf8=2, not_text=1)
    assert documents[0].text == "good text " * 30 + "\ufffd"
    assert documents[1].text == "with a byte order mark"
    assert documents[2].text == "x" * 200 + "\ufffd"


def test_errors_say_where_and_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, content: bytes, match: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=match):
            _read(path)

    refused("a.jsonl", _jsonl({"text": "x"}) + b"{oops\n", r"a\.jsonl, line 2 is not JSON")
    refused("b.jsonl", _jsonl([1]), "must be an object")
    refused("c.jsonl", _jsonl({"title": "x", "url": "y"}), r"no text column: it has \['title', 'url'\]")
    refused("d.jsonl", _jsonl({"text": 5}), "is a int, not text")
    refused("e.parquet", b"PAR1 not a table", r"e\.parquet cannot be read as a table")
    refused("f.arrow", b"nothing", r"f\.arrow cannot be read as a table")
    refused("g.jsonl.gz", gzip.compress(_jsonl({"text": "x" * 5000}))[:-9], "damaged or cut off")
    refused("h.jsonl.gz", b"plain", "damaged or cut off")
    refused("i.md", b"text", "format that cannot be read")
    pq.write_table(pa.table({"title": ["x"]}), tmp_path / "j.parquet")
    with pytest.raises(DataError, match=r"no text column: it has \['title'\]"):
        _read(tmp_path / "j.parquet")
    pq.write_table(pa.table({"text": [1]}), tmp_path / "k.parquet")
    with pytest.raises(DataError, match="type int64, not string"):
        _read(tmp_path / "k.parquet")
    with pytest.raises(DataError, match="does not exist"):
        _read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file that can be read"):
        _read(tmp_path / "empty")

    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    refused("l.jsonl.zst", b"", "pip install zstandard")
