from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpora import Document, ReadCounts, find_files, read_file, require_apart
from rxt_dist.errors import ConfigError, DataError


def _read(*inputs: Path) -> tuple[list[Document], ReadCounts]:
    counts = ReadCounts()
    return [document for file in find_files(inputs) for document in read_file(file, counts)], counts


def _figures(counts: ReadCounts) -> dict[str, int]:
    """The numbers that are not zero."""
    return {name: value for name, value in vars(counts).items() if isinstance(value, int) and value}


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
    assert _figures(counts) == {"documents": 7, "null_text": 3}
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


def test_bad_text_is_mended_or_skipped_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good text " * 30 + b"\xff")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfd\x00\x80" * 50)
    (tmp_path / "c.txt").write_text(" \n\t ")
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfwith a byte order mark")
    (tmp_path / "e.jsonl").write_bytes(b'{"text": "' + b"x" * 200 + b'\\ud800"}\n\n{"text": ""}\n')
    documents, counts = _read(tmp_path)
    assert _figures(counts) == {"documents": 3, "empty": 2, "repaired_utf8": 2, "not_text": 1}
    assert documents[0].text == "good text " * 30 + "\ufffd"
    assert documents[1].text == "with a byte order mark"
    assert documents[2].text == "x" * 200 + "\ufffd"


def test_errors_say_where_and_what(tmp_path: Path) -> None:
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
    refused("g.jsonl.gz", gzip.compress(_jsonl({"text": "x" * 5000}))[:-9], "damaged, cut off")
    refused("h.jsonl.gz", b"plain", "damaged, cut off")
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


def test_documents_above_the_bound_are_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.corpora.MAX_DOCUMENT_BYTES", 100)
    (tmp_path / "a.txt").write_text("x" * 101)
    (tmp_path / "b.txt").write_text("x" * 100)
    (tmp_path / "c.jsonl").write_bytes(
        _jsonl({"text": "ż" * 50}, {"text": "ż" * 51}, {"text": "x" * 5000}, {"text": "c"})
    )
    documents, counts = _read(tmp_path)
    assert [document.text for document in documents] == ["x" * 100, "ż" * 50, "c"]
    assert _figures(counts) == {"documents": 3, "too_large": 3}


def test_invalid_utf8_in_a_table_is_mended_like_everywhere(tmp_path: Path) -> None:
    raw = pa.array([b"good " * 50 + b"\xff", b"\xff" * 50]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, counts = _read(tmp_path)
    assert [document.text for document in documents] == ["good " * 50 + "\ufffd"]
    assert _figures(counts) == {"documents": 1, "repaired_utf8": 1, "not_text": 1}


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    name = os.fsdecode(b"caf\xe9.txt")
    (tmp_path / "corpus" / name).write_text("text")
    for given in (tmp_path / "corpus", tmp_path / "corpus" / name):
        with pytest.raises(DataError, match=r"'/.*caf\\udce9\.txt' is not UTF-8") as caught:
            find_files([given])
        str(caught.value).encode()


@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_utf_16_is_read_by_its_byte_order_mark_and_refused_without(tmp_path: Path, codec: str) -> None:
    content = "\ufeffZażółć gęślą jaźń. ".encode(codec) + ("x" * 200).encode(codec)
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_bytes(content[2:])
    (tmp_path / "c.txt").write_bytes(content + b"?")
    documents, counts = _read(tmp_path)
    assert [document.text for document in documents] == [
        "Zażółć gęślą jaźń. " + "x" * 200,
        "Zażółć gęślą jaźń. " + "x" * 200 + "\ufffd",
    ]
    assert _figures(counts) == {"documents": 2, "not_text": 1, "repaired_utf8": 1}


def test_nul_characters_are_damage_in_every_format(tmp_path: Path) -> None:
    little, much = "x" * 200 + "\0", "x" * 50 + "\0ą"
    (tmp_path / "a.txt").write_text(little)
    (tmp_path / "b.txt").write_text(much)
    (tmp_path / "c.jsonl").write_bytes(_jsonl({"text": little}, {"text": much}))
    pq.write_table(pa.table({"text": [little, much]}), tmp_path / "d.parquet")
    documents, counts = _read(tmp_path)
    assert [document.text for document in documents] == ["x" * 200 + "\ufffd"] * 3
    assert _figures(counts) == {"documents": 3, "not_text": 3, "repaired_utf8": 3}


def test_files_in_which_documents_are_no_text_are_named(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    (root / "a.jsonl").write_bytes(_jsonl({"text": "\0" * 9}, {"text": "sound"}, {"text": "\0"}))
    for number in range(30):
        (root / f"b{number:02}.txt").write_bytes(b"\xff\xfe\xfd" * 9)
    _, counts = _read(root)
    assert counts.not_text == 32
    assert list(counts.not_text_in)[:3] == ["in/a.jsonl", "in/b00.txt", "in/b01.txt"]
    assert counts.not_text_in["in/a.jsonl"] == 2
    assert len(counts.not_text_in) == 20
    total = ReadCounts()
    for _ in range(2):
        total.add(counts)
    assert (total.not_text, total.not_text_in["in/a.jsonl"], len(total.not_text_in)) == (64, 4, 20)


# ---------------------------------------------------------------------------------------------------------------------
# Finding files
# ---------------------------------------------------------------------------------------------------------------------


def _names(*inputs: Path | str, said: list[str] | None = None) -> list[str]:
    return [file.name for file in find_files(inputs, (said if said is not None else []).append)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "c"
    (root / "en").mkdir(parents=True)
    (root / "en" / "a.txt").write_text("a")
    (root / "b.txt").write_text("b")
    return root


def test_a_file_is_read_once_however_often_it_is_named(tree: Path) -> None:
    assert _names(tree, tree / "en") == ["c/b.txt", "c/en/a.txt"]
    assert _names(tree, tree / "en" / ".." / "b.txt", tree) == ["c/b.txt", "c/en/a.txt"]
    assert _names(f"{tree}/**") == ["c/b.txt", "c/en/a.txt"]
    assert _names(tree / "en", tree) == ["c/b.txt", "en/a.txt"]
    (tree / "same.txt").symlink_to(tree / "b.txt")
    assert _names(tree) == ["c/b.txt", "c/en/a.txt"]


def test_a_cache_of_links_to_blobs_is_read_by_the_names_of_the_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    (snapshot / "pl").mkdir(parents=True)
    (blobs / "0a").write_bytes(_jsonl({"text": "one"}))
    pq.write_table(pa.table({"text": ["two"]}), blobs / "0b")
    (snapshot / "pl" / "x.jsonl").symlink_to("../../../blobs/0a")
    (snapshot / "y.parquet").symlink_to("../../blobs/0b")
    for inputs in ([snapshot], [snapshot / "pl", snapshot / "y.parquet"]):
        assert sorted((document.text, document.language) for document in _read(*inputs)[0]) == [
            ("one", "pl"), ("two", "und"),
        ]  # fmt: skip
    said: list[str] = []
    assert len(_names(tmp_path, said=said)) == 2
    assert said == []


def test_links_to_folders_are_followed_and_loops_end(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "d.txt").write_text("d")
    (tree / "more").symlink_to(tmp_path / "elsewhere")
    (tree / "en" / "up").symlink_to(tree)
    assert _names(tree) == ["c/b.txt", "c/en/a.txt", "c/more/d.txt"]
    (tmp_path / "link").symlink_to(tree)
    assert _names(tmp_path / "link") == ["link/b.txt", "link/en/a.txt", "link/more/d.txt"]


def test_what_cannot_be_followed_or_listed_is_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "gone.txt").symlink_to(tmp_path / "nowhere")
    for given in (tree, tree / "gone.txt", tree / "*"):
        with pytest.raises(DataError, match=r"gone\.txt' is a link to nothing"):
            find_files([given])
    (tree / "gone.txt").unlink()
    listed = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("/en"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(DataError, match=r"The folder '.*c/en' cannot be listed: Permission denied"):
        find_files([tree])


def test_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("a")
    (tmp_path / "B.JSONL.GZ").write_bytes(gzip.compress(_jsonl({"text": "b"})))
    pq.write_table(pa.table({"text": ["c"]}), tmp_path / "C.Parquet")
    assert [document.text for document in _read(tmp_path)[0]] == ["a", "b", "c"]


def test_files_of_other_formats_are_told_of(tree: Path) -> None:
    for name in ("x.md", "y.md", "z.csv", "LICENSE", ".hidden"):
        (tree / name).touch()
    for given in (tree, f"{tree}/**"):
        said: list[str] = []
        assert _names(given, said=said) == ["c/b.txt", "c/en/a.txt"]
        (line,) = said
        assert line.startswith("Passing over 4 files of formats that are not read: 2 .md, 1 ")
        assert "1 .csv" in line
    with pytest.raises(DataError, match="holds no file that can be read"):
        find_files([tree / "*.md"])


def test_a_name_that_is_not_utf_8_is_refused(tree: Path) -> None:
    (tree / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(DataError, match=r"caf\\udce9\.txt' is not UTF-8.*rename it"):
        find_files([tree])


def test_files_of_one_name_stay_in_the_order_of_the_inputs(tmp_path: Path) -> None:
    for place in ("z", "a"):
        (tmp_path / place / "texts").mkdir(parents=True)
        (tmp_path / place / "texts" / "x.txt").write_text(place)
    assert [document.text for document in _read(tmp_path / "z/texts", tmp_path / "a/texts")[0]] == ["z", "a"]


# ---------------------------------------------------------------------------------------------------------------------
# Where to write
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_within_the_inputs_is_refused_however_it_is_named(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tree)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for out in ("c", "c/out", "c/en/deep/out", "c/../c/out", "link/out", "other/../link/en/out", tree / "out"):
        for given in ("c", "link", "c/en/..", tree, "other/../c"):
            with pytest.raises(ConfigError, match=f"{out} lies within the input {given}: what is written"):
                require_apart(Path(out), ["other", given])
    # A link below the input that leads to where it is written.
    (tree / "more").symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="lies within the input c"):
        require_apart(Path("other/out"), ["c"])
    (tree / "more").unlink()
    for out in ("out", "c-out", "other/out"):
        require_apart(Path(out), ["c", "link", "c/*.txt"])
    # A file is read by itself, and not what lies beside it.
    require_apart(tree / "out", [tree / "b.txt"])


def test_a_hidden_folder_within_the_inputs_is_not_read(tree: Path, tmp_path: Path) -> None:
    for out in (".out", ".out/deep", "en/.out", "en/.deep/out"):
        require_apart(tree / out, [tree, tmp_path / "*", f"{tree}/e*", f"{tmp_path}/**"])
        (tree / out).mkdir(parents=True)
        (tree / out / "x.txt").write_text("x")
        assert not any("out" in name for name in _names(tree, tmp_path / "*"))
        require_apart(tree / out, [tree, tmp_path / "*", f"{tree}/e*", f"{tmp_path}/**"])
        with pytest.raises(ConfigError, match="lies within the input"):
            require_apart(tree / out / "new", [tree / out])
    (tree / "shown").symlink_to(tree / ".out")
    with pytest.raises(ConfigError, match="lies within the input"):
        require_apart(tree / ".out" / "new", [tree])


@pytest.mark.parametrize(
    ("pattern", "out", "is_refused"),
    [
        ("c/*", "c/out", True),
        ("c/*", "c/out/deep", True),
        ("c/**", "c/out", True),
        ("*/*", "c/out", True),
        ("*/e*", "c/en/out", True),
        ("**/o?t", "c/new/out", True),
        ("link/*", "c/out", True),
        ("c/../c/*", "c/out", True),
        ("c/*.txt", "c/out", False),
        ("c/*", "out", False),
        ("c/e*", "c/out", False),
        ("c/*", "c/.out", False),
        ("c/**/*.txt", "c/out", False),
    ],
)
def test_a_folder_that_a_glob_will_find_is_refused(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, out: str, is_refused: bool
) -> None:
    (tmp_path / "link").symlink_to(tree)
    (tree / "en" / "out.txt").mkdir()
    if pattern == "**/o?t":
        (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    if not is_refused:
        require_apart(Path(out), [pattern])
        (tmp_path / out).mkdir(parents=True)
        require_apart(Path(out), [pattern])
        return
    with pytest.raises(ConfigError, match="lies within the input"):
        require_apart(Path(out), [pattern])
    (tmp_path / out).mkdir(parents=True)
    (tmp_path / out / "shard.arrow").touch()
    assert any("shard.arrow" in name for name in _names(pattern)), "it was refused without need"


def test_languages_come_from_tags_then_names_and_texts(tmp_path: Path) -> None:
    english = "The heron is a large bird that lives near the water. It feeds on fish and frogs."
    for name in ("arxiv/cs/a.txt", "code/pl/b.txt", "pl/c.pl.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(english + name)
    (tmp_path / "pl" / "d.jsonl").write_bytes(
        _jsonl({"text": english, "language": "pol_Latn"}, {"text": "d", "language": "English"}, {"text": "d"})
    )
    documents, counts = _read(tmp_path)
    assert [document.language for document in documents] == ["en", "pl", "pl", "pl", "en", "pl"]
    assert counts.guessed == {"en": 1}
