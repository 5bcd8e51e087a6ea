from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.building.folder import ORIGIN_FILE, PLAN_FILE, SPEC_FILE, UNITS_FOLDER
from data_prep.cleaning.survey import FOLDER
from data_prep.corpora import ReadCounts, read_unit
from data_prep.documents.build import CLEAN_REPORT
from data_prep.interactions.build import REPORT_FILE
from data_prep.readers.base import Input, Slice
from data_prep.units import Plan, Unit, fingerprint_file, group, make_plan
from rxt_dist.config.corpus import RESERVED_NAMES, BuildConfig
from rxt_dist.data.manifest import DATASET_FILE, TOKENIZER_FILE
from rxt_dist.data.sealing import SPARE_FILE
from rxt_dist.errors import ConfigError, DataError


def build(**values: Any) -> BuildConfig:
    return BuildConfig.model_validate_json(json.dumps(values, default=str))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """About 600 kB: one large .jsonl, a .parquet of ten row groups, and a few small files."""
    root = tmp_path / "texts"
    (root / "pl").mkdir(parents=True)
    chooser = random.Random(0)
    lines = [json.dumps({"text": f"line {n} " + "word " * chooser.randrange(60)}) for n in range(2000)]
    (root / "a.en.jsonl").write_text("\n".join(lines) + "\n")
    rows = [f"row {n} " + "słowo " * chooser.randrange(100) for n in range(1000)]
    pq.write_table(pa.table({"text": rows}), root / "pl" / "b.parquet", row_group_size=100, use_dictionary=False)
    for name in "cde":
        (root / f"{name}.en.txt").write_text(f"text {name}")
    return root


def test_units_hold_every_document_once_and_in_order(corpus: Path) -> None:
    read = {}
    for size in (0.03, 0.2, 5.0):
        plan = make_plan(build(unit_mb=size), [corpus])
        counts = ReadCounts()
        read[size] = [document for unit in plan.units for document in read_unit(unit, counts)]
        assert counts.documents == 3003
        assert [unit.name for unit in plan.units] == [f"u{n:05d}" for n in range(len(plan.units))]
        assert plan.text_bytes == sum(part.text_bytes for unit in plan.units for part in unit.slices)
        assert all(unit.text_bytes >= size * 1e6 for unit in plan.units[:-1])
    assert read[0.03] == read[0.2] == read[5.0]
    sizes = [unit.text_bytes for unit in make_plan(build(unit_mb=0.03), [corpus]).units]
    # A piece is a sixteenth of a unit, or a row group; here row groups of 30 kB are the coarser.
    assert max(sizes) < 65_000
    assert len(sizes) > 8


def test_a_plan_is_a_function_of_inputs_and_settings(corpus: Path, tmp_path: Path) -> None:
    config = build(unit_mb=0.05)
    plan = make_plan(config, [corpus])
    assert make_plan(config, [corpus]) == plan
    stored = json.loads(json.dumps(plan.to_dict()))
    assert Plan.from_dict(stored) == plan
    assert all(Unit.from_dict(json.loads(json.dumps(unit.to_dict()))) == unit for unit in plan.units)
    (tmp_path / "elsewhere").mkdir()
    corpus.rename(tmp_path / "elsewhere" / "texts")
    moved = make_plan(config, [tmp_path / "elsewhere" / "texts"])
    assert moved != plan
    assert plan.differences(moved) == []
    with pytest.raises(DataError, match="The plan is damaged"):
        Plan.from_dict(stored | {"units": [{"name": "u"}]})
    with pytest.raises(DataError, match="version 0"):
        Plan.from_dict(stored | {"version": 0})
    with pytest.raises(DataError, match="A stored input has the fields"):
        Plan.from_dict(stored | {"inputs": [{"name": "x"}]})


def test_what_differs_is_named(corpus: Path) -> None:
    plan = make_plan(build(unit_mb=0.05), [corpus])
    assert plan.differences(make_plan(build(unit_mb=0.1), [corpus])) == ["the sizes of the units"]
    others = make_plan(build(unit_mb=0.05, max_document_mb=1), [corpus])
    assert "texts/a.en.jsonl (read in another way)" in plan.differences(others)
    (corpus / "c.en.txt").write_text("text C")
    (corpus / "d.en.txt").unlink()
    (corpus / "f.en.txt").write_text("new")
    assert plan.differences(make_plan(build(unit_mb=0.05), [corpus])) == [
        "+texts/f.en.txt",
        "-texts/d.en.txt",
        "texts/c.en.txt (content)",
    ]


def test_two_folders_of_one_name_stay_apart(tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place / "texts").mkdir(parents=True)
        (tmp_path / place / "texts" / "a.txt").write_text(place)
    folders = [tmp_path / "x" / "texts", tmp_path / "y" / "texts"]
    plan = make_plan(build(), folders)
    (folders[1] / "a.txt").write_text("z")
    assert plan.differences(make_plan(build(), folders)) == ["texts/a.txt (2) (content)"]


def test_sources_tag_their_documents_and_never_share_a_unit(corpus: Path) -> None:
    config = build(
        unit_mb=100,
        sources=[
            {"name": "wiki-pl", "inputs": [corpus / "pl"], "language": "PL-pl"},
            {"name": "notes", "inputs": [str(corpus / "*.txt")]},
            {"name": "web", "inputs": [corpus / "a.en.jsonl"]},
        ],
    )
    plan = make_plan(config)
    assert [(unit.name, unit.slices[0].input.source, len(unit.slices)) for unit in plan.units] == [
        ("u00000", "wiki-pl", 1),
        ("u00001", "notes", 3),
        ("u00002", "web", 1),
    ]
    documents = [document for unit in plan.units for document in read_unit(unit, ReadCounts())]
    tags = {(document.source, document.language) for document in documents}
    assert tags == {("wiki-pl", "pl"), ("notes", "en"), ("web", "en")}
    assert documents[0].id == "wiki-pl/pl/b.parquet#0"


def test_what_cannot_be_planned_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"give build\.sources"):
        make_plan(build())
    with pytest.raises(DataError, match=r"c\.en\.txt belongs to the sources 'a' and 'b'"):
        make_plan(build(sources=[{"name": "a", "inputs": [corpus]}, {"name": "b", "inputs": [corpus / "c.en.txt"]}]))
    with pytest.raises(DataError, match=r"texts/\*\.parquet does not exist"):
        make_plan(build(sources=[{"name": "a", "inputs": [corpus / "*.parquet"]}]))
    (corpus / "z.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"z\.parquet cannot be read as a table"):
        make_plan(build(), [corpus])


def test_pieces_are_gathered_by_hand_count() -> None:
    first, second = (Input(name, name, 100, source="s") for name in "ab")
    third = Input("c", "c", 100, source="t")
    pieces = [
        Slice(first, 0, 1, 40), Slice(first, 1, 2, 50), Slice(first, 2, 3, 30),
        Slice(second, 0, 1, 10), Slice(third, 0, 1, 5), Slice(third, 1, 2, 200), Slice(third, 2, 3, 1),
    ]  # fmt: skip
    assert group(pieces, 80) == [
        Unit("u00000", (Slice(first, 0, 2, 90),), 90),
        Unit("u00001", (Slice(first, 2, 3, 30), Slice(second, 0, 1, 10)), 40),
        Unit("u00002", (Slice(third, 0, 2, 205),), 205),
        Unit("u00003", (Slice(third, 2, 3, 1),), 1),
    ]


def test_fingerprints_cover_small_files_whole_and_the_ends_of_large_ones(tmp_path: Path) -> None:
    path = tmp_path / "x"
    content = bytearray(os.urandom(1 << 20))
    path.write_bytes(content)
    seen = {fingerprint_file(path)}
    for at in (0, 70_000, 500_000, (1 << 20) - 1):
        content[at] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint_file(path))
    assert len(seen) == 5
    content += bytes(5 << 20)
    for at in (0, 65_535, len(content) - 65_536, len(content) - 1, None):
        if at is not None:
            content[at] ^= 1
        path.write_bytes(content)
        seen.add(fingerprint_file(path))
    assert len(seen) == 9  # the last two are of one content
    path.write_bytes(content + b"\0")
    assert fingerprint_file(path) not in seen


def test_one_file_under_two_names_belongs_to_one_source(corpus: Path) -> None:
    (corpus / "link.txt").symlink_to(corpus / "c.en.txt")
    asked = [{"name": "a", "inputs": [corpus / "c.en.txt"]}, {"name": "b", "inputs": [corpus / "link.txt"]}]
    with pytest.raises(DataError, match=r"link\.txt belongs to the sources 'a' and 'b'"):
        make_plan(build(sources=asked))
    plan = make_plan(build(sources=[{"name": "a", "inputs": [corpus, corpus / "pl", f"{corpus}/**"]}]))
    assert len(plan.inputs) == 5


def test_what_is_passed_over_is_said(corpus: Path) -> None:
    (corpus / "notes.md").touch()
    for config, inputs in ((build(), [corpus]), (build(sources=[{"name": "a", "inputs": [corpus]}]), [])):
        said: list[str] = []
        make_plan(config, inputs, said.append)
        assert said == ["Passing over 1 file of formats that are not read: 1 .md"]


def test_tiny_units_are_bounded(corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.001"):
        build(unit_mb=0.0001)
    units = make_plan(build(unit_mb=0.001), [corpus]).units
    assert all(
        part.text_bytes >= 900 for unit in units for part in unit.slices if part.input.name == "texts/a.en.jsonl"
    )


@pytest.mark.parametrize("name", ["dataset.json", "tokenizer.json", "units", "duplicates", "x" * 101, "A", ".x", "a/b"])
def test_sources_have_names_that_nothing_else_in_a_dataset_has(name: str) -> None:
    with pytest.raises(ValueError, match=r"names a folder|name of something else"):
        build(sources=[{"name": name, "inputs": ["x"]}])


def test_the_reserved_names_are_all_that_builders_write() -> None:
    files = {TOKENIZER_FILE, DATASET_FILE, SPARE_FILE, SPEC_FILE, PLAN_FILE, UNITS_FOLDER, CLEAN_REPORT, FOLDER}
    assert files | {REPORT_FILE, ORIGIN_FILE} == RESERVED_NAMES
