from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from data_prep.readers import extent, records, tables
from data_prep.readers.base import Input, Record, Slice
from data_prep.readers.pages import dictionary as page_dictionary
from data_prep.readers.pages import pages
from rxt_dist.errors import DataError

TEXTS = [None if n % 97 == 0 else f"document {n} zażółć " * (n % 7) for n in range(5000)]
TABLE = pa.table({"id": range(5000), "text": TEXTS, "lang": ["pl" if n % 2 else None for n in range(5000)]})
EXPECTED = [Record(str(n), text, "pl" if n % 2 else None, valid=True) for n, text in enumerate(TEXTS)]


def made(path: Path, max_document_bytes: int = 1 << 20) -> Input:
    return Input(path.name, str(path), max_document_bytes, bytes=path.stat().st_size)


def by_piece(item: Input) -> list[Record]:
    """Every piece read for itself, the last one first, so that none can lean on another."""
    parts = list(extent(item).pieces(1))
    read = {part.start: list(records(part)) for part in reversed(parts)}
    return [record for start in sorted(read) for record in read[start]]


@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "lz4", "gzip"])
@pytest.mark.parametrize("rows", [5000, 700])
@pytest.mark.slow
def test_parquet_row_groups(tmp_path: Path, codec: str, rows: int) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, compression=codec, row_group_size=rows)
    found = extent(made(path))
    assert found.parts is not None
    assert len(found.parts) == -(-5000 // rows)
    assert by_piece(made(path)) == EXPECTED
    assert list(records(Slice(found.input, 0, len(found.parts), 0))) == EXPECTED


def test_sizes_are_those_of_the_text_before_compression(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    texts = [f"{n:05}" + "x" * 995 for n in range(2000)]
    other = ["y" * 5000] * 2000
    pq.write_table(pa.table({"other": other, "text": texts}), path, compression="zstd", use_dictionary=False)
    assert extent(made(path)).text_bytes == pytest.approx(2_000_000, rel=0.02)
    for name, start in (("x.arrow", pa.ipc.new_file), ("y.arrow", pa.ipc.new_stream)):
        with start(str(tmp_path / name), pq.read_schema(path)) as file:
            file.write_table(pa.table({"other": other, "text": texts}), max_chunksize=500)
        assert extent(made(tmp_path / name)).text_bytes == pytest.approx(2_000_000, rel=0.02)


@pytest.mark.parametrize("stream", [False, True])
def test_arrow_batches(tmp_path: Path, stream: bool) -> None:
    path = tmp_path / "x.arrow"
    with (pa.ipc.new_stream if stream else pa.ipc.new_file)(str(path), TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=600)
    assert len(list(extent(made(path)).pieces(1))) == (1 if stream else 9)
    found = by_piece(made(path))
    assert [(record.text, record.language) for record in found] == [(r.text, r.language) for r in EXPECTED]
    assert len({record.place for record in found}) == 5000


@pytest.mark.parametrize(
    "kind",
    [pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string()), pa.string_view()],
)
def test_every_type_of_text(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["żółw", None, "drugi", "żółw"])
    column = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    path = tmp_path / "x.arrow"
    table = pa.table({"text": column})
    with pa.ipc.new_file(str(path), table.schema) as file:
        file.write_table(table)
    assert [record.text for record in by_piece(made(path))] == ["żółw", None, "drugi", "żółw"]
    if not pa.types.is_binary_view(kind):
        pq.write_table(table, tmp_path / "x.parquet")
        assert [r.text for r in by_piece(made(tmp_path / "x.parquet"))] == ["żółw", None, "drugi", "żółw"]


def test_invalid_utf8_in_a_string_column_is_given_on_to_be_mended(tmp_path: Path) -> None:
    bad = pa.array([b"good", b"b\xffd"]).cast(pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, bad.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert [record.text for record in by_piece(made(tmp_path / "x.parquet"))] == ["good", "b\udcffd"]


def test_texts_above_the_bound_are_not_carried_along(tmp_path: Path) -> None:
    texts = ["a", "ż" * 50, "ż" * 51, None]
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    found = by_piece(made(tmp_path / "x.parquet", 100))
    assert [(record.text, record.too_large) for record in found] == [
        ("a", False), ("ż" * 50, False), (None, True), (None, False),
    ]  # fmt: skip


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, compression="zstd", row_group_size=1000)
    item, content = made(path), path.read_bytes()
    parts = list(extent(item).pieces(1))
    metadata = pq.ParquetFile(path).metadata.row_group(3).column(1)
    start = metadata.dictionary_page_offset or metadata.data_page_offset
    size = metadata.total_compressed_size
    path.write_bytes(content[:start] + b"\0" * size + content[start + size :])
    list(records(parts[2]))
    with pytest.raises(DataError, match=r"x\.parquet, row group 3, cannot be read as a table"):
        list(records(parts[3]))
    path.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"x\.parquet cannot be read as a table"):
        extent(item)
    pq.write_table(TABLE.rename_columns(["id", "body", "lang"]), path)
    with pytest.raises(DataError, match="has no column 'text'"):
        list(records(parts[0]))
    pq.write_table(TABLE, path)
    with pytest.raises(DataError, match="has 1 row groups; 5 are planned"):
        list(records(parts[4]))
    with pytest.raises(DataError, match=r"no column 'body'; it has \['id', 'text', 'lang'\]"):
        extent(replace(item, text_column="body", source="s"))
    with pytest.raises(DataError, match="the text column 'id' has type int64, not string"):
        extent(replace(item, text_column="id"))


def test_checksums_of_pages_are_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    table = pa.table({"text": [f"document {n:05}" for n in range(1000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = path.read_bytes()
    at = content.index(b"document 00500")
    path.write_bytes(content[:at] + b"d0cument" + content[at + 8 :])
    with pytest.raises(DataError, match=r"row group 0, cannot be read as a table.*(crc|CRC|checksum)"):
        by_piece(made(path))


def test_damaged_arrow_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.arrow"
    with pa.ipc.new_stream(str(path), TABLE.schema) as file:
        file.write_table(TABLE, max_chunksize=600)
    content = path.read_bytes()
    item = extent(made(path)).input
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"x\.arrow cannot be read as a table"):
        list(records(Slice(item, 0, 1, 0)))


@pytest.mark.slow
def test_one_large_row_group_does_not_fill_the_memory(tmp_path: Path) -> None:
    """120 MB of text in one row group; Arrow may hold a few pages and a batch of it."""
    path = tmp_path / "x.parquet"
    text = "".join(f"{n * 2654435761 % 1_000_003:06d} " for n in range(20_000))
    table = pa.table({"text": [text[n % 997 :][:4000] for n in range(30_000)]})
    pq.write_table(table, path, compression="none", use_dictionary=False, row_group_size=30_000)
    script = (
        "import sys, pyarrow\n"
        "from data_prep.readers import extent, records\n"
        "from data_prep.readers.base import Input\n"
        "found = extent(Input('x', sys.argv[1], 1 << 26))\n"
        "assert len(found.parts) == 1, found\n"
        "assert sum(len(r.text) for part in found.pieces(1) for r in records(part)) == 120_000_000\n"
        "print(pyarrow.default_memory_pool().max_memory())\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 40_000_000, f"Arrow held {int(result.stdout):,} bytes at once"


PEAK = """
import sys
from data_prep.readers import extent, records
from data_prep.readers.base import Input
import pyarrow.compute, pyarrow.parquet, json, numpy
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
before = peak()
found = extent(Input("x", sys.argv[1], 32_000_000))
rows = characters = 0
for part in found.pieces(1):
    for record in records(part):
        rows, characters = rows + 1, characters + len(record.text)
print(json.dumps([rows, characters, peak() - before]))
"""


def read_in_a_process(path: Path) -> list[int]:
    """Records, characters and the memory that reading them took."""
    result = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    value = json.loads(result.stdout)
    assert isinstance(value, list)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "feather"])
def test_a_few_huge_texts_among_short_ones_do_not_fill_the_memory(tmp_path: Path, kind: str) -> None:
    """216 MB in 8 of 20,000 texts, in one row group or record batch."""
    huge = "long text " * 2_700_000
    table = pa.table({"text": [huge if n < 720 and n % 90 == 7 else f"short text {n}" for n in range(20_000)]})
    path = tmp_path / f"x.{'arrow' if kind == 'feather' else kind}"
    if kind == "parquet":
        pq.write_table(table, path, use_dictionary=False, write_batch_size=16)  # so a page holds one of them
    else:
        pa.feather.write_feather(table, str(path), compression="uncompressed")
    rows, characters, peak = read_in_a_process(path)
    assert (rows, characters) == (20_000, sum(pc.utf8_length(table["text"]).to_pylist()))
    assert peak < 380_000_000, f"{peak:,} bytes"


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    column = pa.array(["x"])
    for names, twice in ((["text", "text"], "text"), (["text", "lang", "lang"], "lang")):
        path = tmp_path / "x.parquet"
        pq.write_table(pa.Table.from_arrays([column] * len(names), names=names), path)
        with pytest.raises(DataError, match=rf"x\.parquet has more than one column '{twice}'"):
            extent(made(path))


def test_a_language_column_has_to_hold_text(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["x"], "lang": [7]}), path)
    with pytest.raises(DataError, match=r"x\.parquet, column 'lang', has int64 as language.*language_column"):
        extent(made(path))
    assert extent(replace(made(path), language="pl")).text_bytes
    pq.write_table(pa.table({"text": ["x"], "lang": pa.array([b"pl"])}), path)
    assert [record.language for record in by_piece(made(path))] == ["pl"]


# ---------------------------------------------------------------------------------------------------------------------
# Few stored bytes that stand for many
# ---------------------------------------------------------------------------------------------------------------------

LARGE = 3_000_000  # of a text that a dictionary holds; above what is written out for each row


def dictionary(texts: list[str], indices: list[int | None]) -> pa.DictionaryArray:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(texts))


def write_plainly(path: Path, table: pa.Table, **options: object) -> None:
    """As any writer does: that the texts were a dictionary in memory does not stand in the file."""
    pq.write_table(table, path, compression="zstd", store_schema=False, **options)


def largest_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[Record]]:
    """Bytes of the largest batch that was decoded while a file was read, and its records."""
    sizes = []
    inner = tables.batch_records

    def noting(item: Input, batch: pa.RecordBatch, row: int, prefix: str = "") -> Iterator[Record]:
        sizes.append(batch.nbytes)
        return inner(item, batch, row, prefix)

    monkeypatch.setattr(tables, "batch_records", noting)
    found = by_piece(made(path, 1 << 25))
    return max(sizes), found


def test_texts_of_a_large_dictionary_are_never_written_out_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, indices = ["a" * LARGE, "b" * LARGE, "short"], [0, 1, 2, None, 0] * 12
    write_plainly(tmp_path / "x.parquet", pa.table({"text": dictionary(texts, indices)}))
    size, found = largest_batch(tmp_path / "x.parquet", monkeypatch)
    assert size < 3 * LARGE
    assert [record.text for record in found] == [None if index is None else texts[index] for index in indices]
    assert [record.place for record in found] == [str(row) for row in range(60)]


def test_of_large_texts_beside_small_ones_few_are_decoded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The dictionary is left when it is too large: what follows is stored plainly, in the same column chunk.
    texts = ["a" * (1 << 21)] * 30 + [f"small {n} " * 20 for n in range(3000)]
    monkeypatch.setattr(tables, "_DECODED_BYTES", 1 << 23)
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd", write_batch_size=1)
    size, found = largest_batch(tmp_path / "x.parquet", monkeypatch)
    assert size < 9 << 20
    assert [record.text for record in found] == texts


def test_a_language_can_be_a_large_dictionary_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": [str(n) for n in range(60)], "lang": dictionary(["x" * LARGE], [0] * 60)})
    write_plainly(tmp_path / "x.parquet", table)
    size, found = largest_batch(tmp_path / "x.parquet", monkeypatch)
    assert size < 2 * LARGE
    assert {record.language for record in found} == {"x" * LARGE}


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "stream.arrow"])
@pytest.mark.parametrize(
    ("large", "small", "planned"),
    [(50, 100, 50 * LARGE), (1, 3000, LARGE)],  # of the latter an average of the entries would make 4.5 GB
)
def test_units_are_planned_by_what_a_dictionary_stands_for(
    tmp_path: Path, suffix: str, large: int, small: int, planned: int
) -> None:
    path = tmp_path / f"x.{suffix}"
    table = pa.table({"text": dictionary(["a" * LARGE, "short"], [0] * large + [1] * small)})
    if suffix == "parquet":
        write_plainly(path, table)
    else:
        with (pa.ipc.new_stream if suffix.startswith("stream") else pa.ipc.new_file)(str(path), table.schema) as file:
            file.write_table(table)
    found = extent(made(path, 1 << 25)).text_bytes
    assert found == pytest.approx(planned, rel=0.02)
    if suffix == "parquet" and large == 1:  # little more than what is stored: the plan is what it always was
        assert found == pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size


def test_ordinary_tables_are_planned_as_ever(tmp_path: Path) -> None:
    texts = [f"{n:05} " + "word " * 100 if n % 3 else "a text that comes again" for n in range(9000)]
    for dictionary_bytes in (1 << 20, 1 << 16):
        path = tmp_path / f"{dictionary_bytes}.parquet"
        pq.write_table(pa.table({"text": texts}), path, row_group_size=3000, dictionary_pagesize_limit=dictionary_bytes)
        groups = [pq.read_metadata(path).row_group(group) for group in range(3)]
        assert extent(made(path)).parts == tuple(group.column(0).total_uncompressed_size for group in groups)


def test_too_large_texts_of_a_dictionary_are_never_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"text": dictionary(["a" * LARGE, "short"], [0] * 90 + [1] * 10)})
    write_plainly(tmp_path / "x.parquet", table)
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as file:
        file.write_table(table)
    seen: list[int] = []
    inner = tables._strings

    def noting(texts: pa.Array) -> tuple[list[str | None], bool]:
        values, valid = inner(texts)
        seen.extend(len(value or "") for value in values)
        return values, valid

    monkeypatch.setattr(tables, "_strings", noting)
    for name in ("x.parquet", "x.arrow"):
        found = by_piece(made(tmp_path / name, 1000))
        assert [record.too_large for record in found] == [True] * 90 + [False] * 10
        assert {record.text for record in found[90:]} == {"short"}
        assert extent(made(tmp_path / name, 1000)).text_bytes < 2.5 * LARGE
    assert max(seen) == len("short")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_dictionary": False},
        {"data_page_version": "2.0"},
        {"data_page_size": 500, "write_batch_size": 10},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"write_page_checksum": True, "write_page_index": True},
        {"write_statistics": False, "compression": "none"},
        {"dictionary_pagesize_limit": 3000},
    ],
)
def test_pages_are_told_from_their_headers(tmp_path: Path, options: dict[str, object]) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path, **options)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    with open(path, "rb") as file:
        found = pages(file, chunk)
        first = page_dictionary(file, chunk)
    assert sum(page.values for page in found if not page.is_dictionary) == 5000
    # What a footer counts are the pages and their headers.
    headers = chunk.total_uncompressed_size - sum(page.bytes for page in found)
    assert 0 < headers <= 200 * len(found)
    assert (first is not None) == chunk.has_dictionary_page == found[0].is_dictionary
    assert any(page.by_index for page in found) == chunk.has_dictionary_page
    if "dictionary_pagesize_limit" in options:
        assert not all(page.by_index for page in found[1:])


def test_headers_that_are_not_understood_bound_a_value_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(TABLE, path)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    content = path.read_bytes()
    for damaged in (b"\x1b" * len(content), b"\xff" * len(content), content[:10], b"\x00" * len(content)):
        path.write_bytes(damaged)
        with open(path, "rb") as file:
            assert [page.bytes for page in pages(file, chunk)] == [chunk.total_uncompressed_size]
            assert page_dictionary(file, chunk) is None
