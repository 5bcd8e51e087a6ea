from __future__ import annotations

import gzip
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.readers import extent, records
from data_prep.readers.base import Input, Record, Slice
from rxt_dist.errors import DataError


def made(path: Path, max_document_bytes: int = 1 << 20) -> Input:
    return Input(path.name, str(path), max_document_bytes, bytes=path.stat().st_size)


def whole(path: Path, max_document_bytes: int = 1 << 20) -> list[Record]:
    found = extent(made(path, max_document_bytes))
    return [record for part in found.pieces(1 << 40) for record in records(part)]


def zstd(content: bytes) -> bytes:
    return bytes(pa.compress(content, codec="zstd", asbytes=True))


LINES = st.lists(
    st.one_of(
        st.text(alphabet="ażółć 🙂\n\r\t", max_size=12).map(lambda text: json.dumps({"text": text}).encode()),
        st.text(alphabet="ążź🙂", max_size=12).map(lambda t: json.dumps({"text": t}, ensure_ascii=False).encode()),
        st.sampled_from([b"", b" ", b'{"text": null}', b'{"lang": "pl"}']),
    ),
    min_size=1,
    max_size=12,
)


@given(LINES, st.sampled_from([b"\n", b"\r\n"]), st.booleans(), st.integers(1, 60))
@settings(max_examples=150, deadline=None)
def test_slices_of_lines_give_the_records_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ending: bytes, ended: bool, grain: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "x.jsonl"
    path.write_bytes(b'{"text": "first"}' + ending + ending.join(lines) + (ending if ended else b""))
    expected = whole(path)
    assert [record.text for record in expected] == ["first"] + [
        json.loads(line).get("text") for line in lines if line.strip()
    ]
    found = extent(made(path))
    parts = list(found.pieces(grain))
    assert [part.start for part in parts] == [0] + [part.stop for part in parts[:-1]]
    assert parts[-1].stop == path.stat().st_size
    assert sum(part.text_bytes for part in parts) == found.text_bytes
    assert [record for part in parts for record in records(part)] == expected


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.slow
def test_packed_lines_are_read_over_every_frame(tmp_path: Path, suffix: str) -> None:
    lines = [json.dumps({"text": f"line {number}"}).encode() + b"\n" for number in range(20_000)]
    pack = {".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}[suffix]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(pack(b"".join(lines[:9000])) + pack(b"".join(lines[9000:])))
    found = whole(path)
    assert [record.text for record in found] == [f"line {number}" for number in range(20_000)]
    assert int(found[-1].place) == sum(map(len, lines[:-1]))


@pytest.mark.parametrize(("suffix", "pack"), [(".jsonl.gz", gzip.compress), (".jsonl.zst", zstd)])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
@pytest.mark.slow
def test_a_packed_file_that_was_cut_off_is_refused(tmp_path: Path, suffix: str, pack: object, kept: float) -> None:
    assert callable(pack)
    content = pack(b"".join(json.dumps({"text": str(n) * 20}).encode() + b"\n" for n in range(20_000)))
    path = tmp_path / f"x{suffix}"
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(DataError, match=rf"x{suffix} is (damaged|empty)"):
        whole(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.slow
def test_gigantic_lines_are_passed_over_without_being_held(tmp_path: Path, suffix: str) -> None:
    giant = b'{"text": "' + b"x" * (48 << 20) + b'"}\n'
    content = b'{"text": "a"}\n' + giant + b'{"text": "b"}\n' + giant[:-1]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(gzip.compress(content, 1) if suffix.endswith("gz") else content)
    tracemalloc.start()
    found = whole(path, max_document_bytes=100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(record.text, record.too_large) for record in found] == [
        ("a", False), (None, True), ("b", False), (None, True),
    ]  # fmt: skip
    assert peak < 8 << 20, f"{peak:,} bytes for lines of 48 MiB"
    if suffix == ".jsonl":
        parts = list(extent(made(path, 100_000)).pieces(1 << 19))
        assert len(parts) > 10
        assert [record for part in parts for record in records(part)] == found


def test_a_gigantic_text_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("x" * 101)
    assert whole(path, 100) == [Record("0", None, too_large=True)]
    assert whole(path, 101) == [Record("0", "x" * 101)]


def test_errors_name_the_line_of_the_file_also_within_a_slice(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 50 + b"{oops\n" + b'{"text": 5}\n')
    item = replace(made(path), text_column="text")
    with pytest.raises(DataError, match=r"x\.jsonl, line 51 is not JSON.*\{oops"):
        list(records(Slice(item, 500, path.stat().st_size, 0)))
    with pytest.raises(DataError, match=r"x\.jsonl, line 52: 'text' is a int"):
        list(records(Slice(item, 803, path.stat().st_size, 0)))


def test_columns_are_chosen_and_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "no", "inhalt": "yes", "tongue": "pl", "lang": "en"}\n{"inhalt": "and", "text": "no"}\n')
    item = replace(made(path), source="s", text_column="inhalt", language_column="tongue")
    (part,) = extent(item).pieces(1 << 30)
    assert [(record.text, record.language) for record in records(part)] == [("yes", "pl"), ("and", None)]
    with pytest.raises(DataError, match=r"no column 'inhlt'; it has \['text', 'inhalt', 'tongue', 'lang'\]\. Did you"):
        extent(replace(item, text_column="inhlt"))
    with pytest.raises(DataError, match=r"no column 'lng'.*language_column of source 's'"):
        extent(replace(item, language_column="lng"))


def test_an_empty_file_has_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").touch()
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(b"\n\n"))
    assert whole(tmp_path / "x.jsonl") == whole(tmp_path / "y.jsonl.gz") == []


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
@pytest.mark.slow
def test_the_text_in_lines_is_estimated(tmp_path: Path, suffix: str) -> None:
    texts = [f"{number} " + "ż" * (number * 7919 % 500) for number in range(20_000)]
    lines = b"".join(json.dumps({"text": text, "url": "x" * 300}).encode() + b"\n" for text in texts)
    path = tmp_path / f"x{suffix}"
    path.write_bytes({".jsonl": bytes, ".jsonl.gz": gzip.compress, ".jsonl.zst": zstd}[suffix](lines))
    assert extent(made(path)).text_bytes == pytest.approx(sum(len(text.encode()) for text in texts), rel=0.15)


def test_blank_lines_before_the_first_record(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n" * 300_000 + b'{"content": "here"}\n')
    assert [record.text for record in whole(path)] == ["here"]


def test_a_byte_order_mark_and_blank_lines_before_the_first_record(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\r\n \n{"text": "here"}\n\xef\xbb\xbf{"text": "there"}\n')
    assert [record.text for record in whole(path)] == ["here", "there"]


def test_json_beyond_what_python_reads(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a", "id": ' + b"9" * 5000 + b"}\n")
    assert [record.text for record in whole(path)] == ["a"]
    path.write_bytes(b'{"text": "a"}\n{"text": "b", "tree": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n")
    with pytest.raises(DataError, match=r"x\.jsonl, line 2 is not JSON \(nested too deeply\)"):
        whole(path)
    path.write_bytes(b'{"text": 7, "id": ' + b"9" * 5000 + b"}\n")
    with pytest.raises(DataError, match="'text' is a int, not text"):
        whole(path)


def test_a_language_is_text_or_missing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a", "language": null}\n{"text": "b", "lang": ["pl"]}\n')
    with pytest.raises(DataError, match=r"x\.jsonl, line 2 has a list as language.*language_column"):
        whole(path)


def test_a_window_that_is_too_large_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.zst"
    content = b'{"text": "a"}\n'
    # A frame with a window of 256 MiB, in one block that is stored as it is.
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00\x90" + (len(content) << 3 | 1).to_bytes(3, "little") + content)
    with pytest.raises(DataError, match=r"x\.jsonl\.zst needs too large a window.*without --long"):
        whole(path)
