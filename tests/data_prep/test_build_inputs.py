"""Files that are edited while, or between two lives in which, a dataset is built from them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.building import builder
from data_prep.building.builder import task_of
from data_prep.corpora import Document
from data_prep.documents import build as build_module
from data_prep.documents import recheck
from data_prep.documents import unit as unit_module
from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.documents.inputs import SUFFIX
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from data_prep.units import Plan, Unit, fingerprint_file
from rxt_dist.data.inputs import InputFile
from rxt_dist.data.manifest import DatasetManifest, load_manifest
from rxt_dist.data.rows import BOUNDARY_POLICY
from rxt_dist.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save_tokenizer(train_tokenizer([Document("line word " * 40, "en", "en", "")], 300), path)
    return path


@pytest.fixture
def request_of(tmp_path: Path, tokenizer: Path) -> BuildRequest:
    """A file of 2 MB, of which a fingerprint sees the half, and a small one."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    # One long word a line: a tokenizer looks up each word anew.
    lines = [json.dumps({"text": f"line {n:06} " + "word" * 50}) for n in range(9_000)]
    (corpus / "a.en.jsonl").write_text("\n".join(lines) + "\n")
    (corpus / "b.en.txt").write_text("a small one")
    return BuildRequest(
        (corpus,), tmp_path / "out", tokenizer, seq_len=64, workers=1, unit_bytes=400_000, backend="tokenizers"
    )


def edit(path: Path, hidden: bool = True) -> None:
    """Another document in place, near the beginning, with size and time as they were; `hidden` from the fingerprint."""
    status, before = path.stat(), fingerprint_file(path)
    content = path.read_bytes()
    at = content.index(b"word", 100_000 if hidden else 10)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(b"WORD")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert (fingerprint_file(path) == before) == hidden


def first_life(request: BuildRequest) -> None:
    """A build that ends half way: the task of two that builds the first unit."""
    task = next(task for task in (0, 1) if task_of(Unit("u00000", (), 1), 2) == task)
    result = build_dataset(replace(request, task=task, tasks=2))
    assert result.manifest is None
    assert (request.out / "units" / "u00000.json").exists()


@pytest.mark.slow
def test_an_edit_between_two_lives_that_size_time_and_samples_do_not_show(request_of: BuildRequest) -> None:
    first_life(request_of)
    content = (request_of.inputs[0] / "a.en.jsonl").read_bytes()
    edit(request_of.inputs[0] / "a.en.jsonl")
    for _ in range(2):  # it stays refused
        with pytest.raises(DataError, match=r"texts of unit u00000 are not those .*a\.en\.jsonl was edited since"):
            build_dataset(request_of)
        assert not (request_of.out / "dataset.json").exists()
    (request_of.inputs[0] / "a.en.jsonl").write_bytes(content)
    assert build_dataset(request_of).manifest is not None


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.slow
def test_the_edited_unit_is_found_by_name(
    request_of: BuildRequest, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(build_module.DocumentJob, "merge", stop)
    with pytest.raises(KeyboardInterrupt):
        build_dataset(request_of)
    monkeypatch.undo()
    edit(request_of.inputs[0] / "a.en.jsonl")
    said: list[str] = []
    with pytest.raises(DataError, match=r"texts of unit u00000 are not those .*a\.en\.jsonl was edited since"):
        build_dataset(replace(request_of, workers=workers), said.append)
    assert any("may have changed since they were built: reading them again" in line for line in said)
    assert not (request_of.out / "dataset.json").exists()


def stop(*arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_corpus_that_is_copied_between_two_lives_is_read_again_and_taken(
    request_of: BuildRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build_dataset(replace(request_of, out=tmp_path / "whole")).manifest
    first_life(request_of)
    corpus = request_of.inputs[0]
    shutil.copytree(corpus, tmp_path / "copy" / "corpus")
    shutil.rmtree(corpus)
    moved = replace(request_of, inputs=(tmp_path / "copy" / "corpus",))
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(build_module.DocumentJob, "merge", stop)
        with pytest.raises(KeyboardInterrupt):
            build_dataset(moved, said.append)
    assert any("reading them again" in line for line in said)
    said.clear()
    result = build_dataset(moved, said.append)
    assert not any("reading them again" in line for line in said)  # once is enough
    assert result.manifest is not None
    assert whole is not None
    assert result.manifest.root_digest == whole.root_digest
    assert not list(request_of.out.rglob(f".*{SUFFIX}"))


@pytest.mark.slow
def test_nothing_is_read_twice_where_nothing_was_touched(
    request_of: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_life(request_of)
    monkeypatch.setattr(recheck, "read_unit", stop)
    prints: list[Path] = []
    inner = fingerprint_file
    monkeypatch.setattr("data_prep.documents.inputs.fingerprint_file", lambda path: prints.append(path) or inner(path))
    said: list[str] = []
    assert build_dataset(request_of, said.append).manifest is not None
    assert not any("reading them again" in line for line in said)
    assert prints == []


EDITS = {
    # Size and time as before: found when the unit is read again at the end, or before the next unit by the fingerprint.
    "hidden": (lambda path: edit(path), "was edited since"),
    "seen by the fingerprint": (lambda path: edit(path, hidden=False), "is not the file that was planned any more"),
    "written to": (lambda path: path.write_bytes(path.read_bytes()), "was changed while unit u00000 was read from it"),
}


@pytest.mark.parametrize("kind", EDITS)
@pytest.mark.slow
def test_an_edit_while_a_unit_is_read_ends_the_build(
    request_of: BuildRequest, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    inner, path = unit_module.read_unit, request_of.inputs[0] / "a.en.jsonl"
    change, told = EDITS[kind]

    def editing(unit, counts):  # type: ignore[no-untyped-def]
        yield from inner(unit, counts)
        if unit.name == "u00000":
            change(path)

    monkeypatch.setattr(unit_module, "read_unit", editing)
    with pytest.raises(DataError, match=rf"a\.en\.jsonl {told}"):
        build_dataset(request_of)
    assert not (request_of.out / "dataset.json").exists()


@pytest.mark.slow
def test_a_new_link_to_an_input_is_no_edit(request_of: BuildRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """It changes the change time and nothing else: the unit is read again, and taken."""
    inner, path = unit_module.read_unit, request_of.inputs[0] / "a.en.jsonl"

    def linking(unit, counts):  # type: ignore[no-untyped-def]
        yield from inner(unit, counts)
        if unit.name == "u00001":
            os.link(path, request_of.out.parent / "link")

    monkeypatch.setattr(unit_module, "read_unit", linking)
    said: list[str] = []
    assert build_dataset(request_of, said.append).manifest is not None
    assert any("reading them again" in line for line in said)


@pytest.mark.slow
def test_another_host_knows_other_inodes(request_of: BuildRequest) -> None:
    """Records of other hosts are believed as far as size and time of modification go."""
    first_life(request_of)
    for record in (request_of.out / "units").glob(f".*{SUFFIX}"):
        content = json.loads(record.read_text())
        files = [[size, modified, changed + 5, inode + 1] for size, modified, changed, inode in content["files"]]
        record.write_text(json.dumps({"host": "another", "files": files}))
    said: list[str] = []
    assert build_dataset(request_of, said.append).manifest is not None
    assert not any("reading them again" in line for line in said)


def test_a_file_that_is_not_the_planned_one_any_more_is_named(
    request_of: BuildRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request_of.inputs[0] / "a.en.jsonl"
    inner = builder.run_units

    def late(*arguments, **options):  # type: ignore[no-untyped-def]
        edit(path, hidden=False)
        return inner(*arguments, **options)

    monkeypatch.setattr(builder, "run_units", late)
    with pytest.raises(DataError, match=r"a\.en\.jsonl is not the file that was planned any more"):
        build_dataset(request_of)


@pytest.mark.slow
def test_a_unit_without_a_record_is_read_again(request_of: BuildRequest) -> None:
    """As of a build that an older version began."""
    first_life(request_of)
    for record in (request_of.out / "units").glob(f".*{SUFFIX}"):
        record.unlink()
    said: list[str] = []
    assert build_dataset(request_of, said.append).manifest is not None
    assert any("reading them again" in line for line in said)


@pytest.mark.slow
def test_the_hash_of_an_input_has_the_name_of_what_it_is(request_of: BuildRequest) -> None:
    build_dataset(request_of)
    stored = json.loads((request_of.out / "dataset.json").read_text())["inputs"]
    paths = [request_of.inputs[0] / "a.en.jsonl", request_of.inputs[0] / "b.en.txt"]
    assert stored == [
        {"file": f"corpus/{path.name}", "bytes": path.stat().st_size, "fingerprint": fingerprint_file(path)}
        for path in paths
    ]
    assert all("seen" not in item for item in json.loads((request_of.out / "plan.json").read_text())["inputs"])
    plan = Plan.from_dict(json.loads((request_of.out / "plan.json").read_text()))
    assert all(item.seen is None for item in plan.inputs)


@pytest.mark.slow
def test_older_manifests_are_read_as_what_they_meant(request_of: BuildRequest) -> None:
    build_dataset(request_of)
    manifest = load_manifest(request_of.out)
    old = manifest.to_dict()
    old["inputs"] = [{"file": "x.txt", "bytes": 1, "blake3": "abc"}]
    assert DatasetManifest.from_dict(old).inputs == (InputFile("x.txt", 1, fingerprint="abc"),)
    assert DatasetManifest.from_dict(old).root_digest == manifest.root_digest
    old["boundaries"] = "interactions"
    assert DatasetManifest.from_dict(old).inputs == (InputFile("x.txt", 1, blake3="abc"),)
    assert manifest.boundaries == BOUNDARY_POLICY
    assert InputFile("x", 1, fingerprint="a").in_spec() == {"file": "x", "bytes": 1, "blake3": "a"}
