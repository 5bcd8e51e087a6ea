"""Datasets that a version with other rules for the language of a text planned."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep import units as units_module
from data_prep.building.builder import task_of
from data_prep.corpora import Document
from data_prep.documents import build as build_module
from data_prep.documents.build import BuildRequest, build_dataset
from data_prep.readers.base import HubDataset, Input, Slice
from data_prep.shards.repair import repair
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from data_prep.units import READING_VERSION, Plan, Unit, reading_problem
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.data.manifest import digest_json, load_manifest
from rxt_dist.data.verify import verify_full
from rxt_dist.errors import DataError

make_plan = build_module.make_plan


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Plans are those of the earlier version until this is undone."""
    monkeypatch.setattr(units_module, "READING_VERSION", 1)
    monkeypatch.setattr(build_module, "make_plan", lambda *given: replace(make_plan(*given), reading=1))
    return monkeypatch


def _request(root: Path, folder: str, name: str = "a", language: str | None = None) -> BuildRequest:
    corpus = root / folder
    corpus.mkdir()
    lines = [json.dumps({"text": f"The bears and that which they have had {n}."}) for n in range(200)]
    (corpus / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    save_tokenizer(train_tokenizer([Document("the bears " * 40, "en", "en", "")], 300), root / "tokenizer.json")
    config = BuildConfig.model_validate(
        {
            "sources": [{"name": "s", "inputs": [str(corpus)], "language": language}],
            "tokenizer": root / "tokenizer.json",
        }
    )
    return BuildRequest(
        (), root / "out", root / "tokenizer.json", seq_len=64, workers=1, unit_bytes=1500, config=config
    )


def _begin(request: BuildRequest) -> None:
    task = next(task for task in (0, 1) if task_of(Unit("u00000", (), 1), 2) == task)
    assert build_dataset(replace(request, task=task, tasks=2)).manifest is None


def _contents(root: Path) -> dict[str, bytes]:
    files = (path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def test_an_unfinished_build_whose_folder_names_a_language_is_not_continued(
    tmp_path: Path, old: pytest.MonkeyPatch
) -> None:
    request = _request(tmp_path, "pl")
    _begin(request)
    before = _contents(request.out)
    assert "reading" not in json.loads(before["plan.json"])
    old.undo()
    for _ in range(2):
        with pytest.raises(DataError, match=r"goes by the names of folders, as for pl/a\.jsonl.*or build into another"):
            build_dataset(request)
        assert _contents(request.out) == before
    assert build_dataset(replace(request, out=tmp_path / "other")).manifest is not None
    plan = json.loads((tmp_path / "other/plan.json").read_text())
    assert plan["reading"] == READING_VERSION


@pytest.mark.parametrize(
    "given", [("texts", "a", None), ("texts", "a.pl", None), ("pl", "a.pl", None), ("pl", "a", "pl")]
)
def test_it_goes_on_where_both_versions_read_alike(tmp_path: Path, old: pytest.MonkeyPatch, given: Any) -> None:
    request = _request(tmp_path, *given)
    _begin(request)
    before = (request.out / "plan.json").read_bytes()
    old.undo()
    built = build_dataset(request).manifest
    assert built is not None
    assert (request.out / "plan.json").read_bytes() == before
    new = build_dataset(replace(request, out=tmp_path / "new")).manifest
    assert new is not None
    assert new.root_digest == built.root_digest
    assert _shards(request.out) == _shards(tmp_path / "new")


def _shards(out: Path) -> dict[str, bytes]:
    return {name: content for name, content in _contents(out).items() if name.endswith(".arrow")}


@pytest.mark.parametrize(("folder", "is_refused"), [("pl", True), ("texts", False)])
def test_a_finished_dataset_stays_and_is_repaired_where_that_is_possible(
    tmp_path: Path, old: pytest.MonkeyPatch, folder: str, is_refused: bool
) -> None:
    request = _request(tmp_path, folder)
    build_dataset(request)
    before = _contents(request.out)
    old.undo()
    build_dataset(request)
    assert _contents(request.out) == before
    shard = next(name for name in before if name.endswith("train/u00000-000.arrow"))
    (request.out / shard).write_bytes(b"short")
    mended = repair(request.out, verify_full(request.out, 1))
    if is_refused:
        assert [finding.file for finding in mended.failed] == [shard]
        assert "goes by the names of folders, as for pl/a.jsonl; repair it with that" in mended.failed[0].problem
        with pytest.raises(DataError, match="cannot be continued"):
            build_dataset(request)
    else:
        assert mended.failed == ()
        assert _contents(request.out) == before


def test_the_rules_are_no_part_of_the_specification(tmp_path: Path) -> None:
    request = _request(tmp_path, "pl")
    build_dataset(request)
    plan, spec = (json.loads((request.out / name).read_text()) for name in ("plan.json", "build.json"))
    assert plan.pop("reading") == READING_VERSION
    for item in plan["inputs"]:
        del item["path"]
    assert spec["plan"] == digest_json(plan)
    assert load_manifest(request.out).spec_hash == digest_json(spec)


def test_plans_keep_their_rules_and_those_of_the_future_are_refused() -> None:
    for reading in (1, READING_VERSION):
        value = json.loads(json.dumps(Plan((), (), reading).to_dict()))
        assert value.get("reading", 1) == reading
        assert Plan.from_dict(value).reading == reading
    with pytest.raises(DataError, match="rules of version 3"):
        Plan.from_dict(value | {"reading": 3})
    for damaged in ([], value | {"reading": "two"}):
        with pytest.raises(DataError, match="damaged"):
            Plan.from_dict(damaged)  # type: ignore[arg-type]


def test_names_of_datasets_are_compared_too() -> None:
    def problem(path: str, *files: str) -> str | None:
        item = Input("/".join([path, "train", *files]), path, 100, hub=HubDataset(None, None, "train", files))
        unit = Unit("u00000", (Slice(item, 0, 1, 1),), 1)
        assert reading_problem(READING_VERSION, [unit]) is None
        return reading_problem(1, [unit])

    assert problem("texts") is problem("texts", "a.jsonl") is problem("texts", "a.pl.jsonl") is None
    for differing in (("pl",), ("pl/texts",), ("texts", "pl/a.jsonl"), ("texts", "a.jsonl", "b.pl.jsonl")):
        assert problem(*differing) is not None, differing
