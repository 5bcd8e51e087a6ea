from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpora import named_language
from data_prep.readers import extent
from data_prep.readers.base import HubDataset, Input
from rxt_dist.errors import DataError

TEXTS = [f"document {n} zażółć" for n in range(2500)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local dataset with two configurations, one of them in two files."""
    root = tmp_path_factory.mktemp("hub") / "corpus"
    for config, columns in (
        ("wiki", {"text": TEXTS, "lang": ["pl"] * 2500}),
        ("code", {"body_text": ["def f(): pass", None]}),
    ):
        (root / config).mkdir(parents=True)
        table = pa.table(columns)
        half = len(table) // 2
        pq.write_table(table.slice(0, half), root / config / "train-0.parquet", row_group_size=100)
        pq.write_table(table.slice(half), root / config / "train-1.parquet")
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: wiki, data_files: [{split: train, path: wiki/*.parquet}]}\n"
        "- {config_name: code, data_files: [{split: train, path: code/*.parquet}]}\n---\n"
    )
    (root / "lines.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:100]))
    return root


SCRIPT = """
import json, sys
from data_prep.corpora import ReadCounts, read_unit
from data_prep.units import Plan, make_plan
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.errors import DataError
results = []
for source in json.loads(sys.argv[1]):
    try:
        config = BuildConfig.model_validate_json(json.dumps({"unit_mb": 0.01, "sources": [source]}))
        plan = Plan.from_dict(json.loads(json.dumps(make_plan(config).to_dict())))
        assert plan.differences(make_plan(config)) == []
        counts = ReadCounts()
        documents = [vars(document) for unit in plan.units for document in read_unit(unit, counts)]
        rows = [row for unit in plan.units for part in unit.slices for row in (part.start, part.stop)]
        results.append({"documents": documents, "counts": vars(counts), "units": len(plan.units), "rows": rows,
                        "inputs": [item.to_dict() for item in plan.inputs]})
    except DataError as error:
        results.append({"error": str(error)})
print(json.dumps(results))
"""


def planned(tmp_path: Path, *sources: dict[str, Any]) -> list[dict[str, Any]]:
    """Plan and read sources in a process of its own, without network and with a fresh cache."""
    environment = dict(os.environ, HF_HOME=str(tmp_path), HF_DATASETS_OFFLINE="1", HF_HUB_OFFLINE="1")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(sources)], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    value = json.loads(result.stdout)
    assert isinstance(value, list)
    return value


@pytest.mark.slow
def test_datasets_by_folder_configuration_and_files(folder: Path, tmp_path: Path) -> None:
    wiki, code, lines, part = planned(
        tmp_path,
        {"name": "wiki", "dataset": str(folder), "config": "wiki"},
        {"name": "code", "dataset": str(folder), "config": "code", "text_column": "body_text", "language": "en"},
        {"name": "lines", "dataset": str(folder), "data_files": ["lines.jsonl"]},
        {"name": "part", "dataset": str(folder), "config": "wiki", "split": "train[10:20]"},
    )
    assert [document["text"] for document in wiki["documents"]] == TEXTS
    assert {(document["language"], document["source"]) for document in wiki["documents"]} == {("pl", "wiki")}
    assert wiki["documents"][7]["id"] == f"wiki/{folder}/wiki/train#7"
    assert wiki["units"] > 4
    assert wiki["rows"][0] == 0
    assert wiki["rows"][1:-1:2] == wiki["rows"][2::2]
    assert wiki["rows"][-1] == 2500
    (item,) = wiki["inputs"]
    assert item["fingerprint"].endswith("-2500")
    assert item["bytes"] == pytest.approx(sum(len(text.encode()) for text in TEXTS), rel=0.5)
    assert [document["text"] for document in code["documents"]] == ["def f(): pass"]
    assert code["counts"] == {
        "documents": 1, "empty": 0, "null_text": 1, "too_large": 0, "repaired_utf8": 0, "not_text": 0,
        "guessed": {}, "not_text_in": {},
    }  # fmt: skip
    assert [document["text"] for document in lines["documents"]] == TEXTS[:100]
    assert [document["text"] for document in part["documents"]] == TEXTS[10:20]


@pytest.mark.slow
def test_what_cannot_be_loaded_is_named(folder: Path, tmp_path: Path) -> None:
    nowhere, config, column = planned(
        tmp_path,
        {"name": "a", "dataset": "nobody/nothing", "config": "xy", "revision": "abc"},
        {"name": "b", "dataset": str(folder), "config": "wikis"},
        {"name": "c", "dataset": str(folder), "config": "code"},
    )
    for asked in ("nobody/nothing", "config 'xy'", "revision 'abc'", "HF_HUB_OFFLINE", "HF_HOME"):
        assert asked in nowhere["error"]
    assert "config 'wikis'" in config["error"]
    assert "has no text column: it has ['body_text']" in column["error"]


@pytest.mark.slow
def test_a_dataset_saved_to_disk(tmp_path: Path) -> None:
    make = (
        f"import datasets; datasets.Dataset.from_dict({{'text': {TEXTS[:50]!r}}}).save_to_disk({str(tmp_path / 'd')!r})"
    )
    subprocess.run([sys.executable, "-c", make], check=True, capture_output=True)
    (saved,) = planned(tmp_path, {"name": "saved", "dataset": str(tmp_path / "d")})
    assert [document["text"] for document in saved["documents"]] == TEXTS[:50]


@pytest.mark.slow
def test_folders_above_a_dataset_do_not_name_its_language(folder: Path, tmp_path: Path) -> None:
    for place in ("en/corpus", "corpus/en"):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        shutil.copytree(folder, tmp_path / place)
    above, named = planned(
        tmp_path,
        {"name": "above", "dataset": str(tmp_path / "en/corpus"), "data_files": ["lines.jsonl"]},
        {"name": "named", "dataset": str(tmp_path / "corpus/en"), "data_files": ["lines.jsonl"]},
    )
    assert {document["language"] for document in named["documents"]} == {"en"}
    assert named["counts"]["guessed"] == {}
    assert {document["language"] for document in above["documents"]} == set(above["counts"]["guessed"])
    assert "en" not in above["counts"]["guessed"]


@pytest.mark.parametrize(
    ("path", "config", "split", "files", "named"),
    [
        ("texts", None, "train", ("pl/a.jsonl", "en/a.jsonl"), None),
        ("texts", None, "train", ("en/a.jsonl", "other/a.jsonl"), None),
        ("pl", None, "train", ("en/a.jsonl", "other/a.jsonl"), None),
        ("pl", None, "train", ("pl/a.jsonl", "other/a.jsonl"), "pl"),
        ("texts", None, "train", ("pl/a.jsonl", "b.pl.jsonl"), "pl"),
        ("texts", "pl", "train", (), "pl"),
        ("texts", None, "pl[:10%]", (), "pl"),
        ("above/pl", None, "train", (), "pl"),
        ("pl/texts", None, "train", (), None),
    ],
)
def test_data_files_name_a_language_only_where_all_of_them_do(
    path: str, config: str | None, split: str, files: tuple[str, ...], named: str | None
) -> None:
    asked = HubDataset(config, None, split, files)
    name = "/".join([path, *(detail for detail in (config, split, *files) if detail)])
    assert named_language(Input(name, path, 100, hub=asked)) == named
    assert named_language(Input(name, path, 100, hub=asked, language="Polish")) == "pl"


@pytest.mark.slow
def test_documents_of_two_languages_in_one_dataset_are_guessed(tmp_path: Path) -> None:
    texts = {"pl": "Nie wiem, czy to jest dobre, ale było ich bardzo mało.", "en": "They were all that we had of it."}
    for language, text in texts.items():
        (tmp_path / "texts" / language).mkdir(parents=True)
        (tmp_path / "texts" / language / "a.jsonl").write_text(json.dumps({"text": text}) + "\n")
    files = [f"{language}/a.jsonl" for language in texts]
    (mixed,) = planned(tmp_path / "cache", {"name": "m", "dataset": str(tmp_path / "texts"), "data_files": files})
    assert {document["language"]: document["text"] for document in mixed["documents"]} == texts
    assert mixed["counts"]["guessed"] == {"pl": 1, "en": 1}


def test_an_error_without_a_message_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise MemoryError

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    item = Input("nobody/empty", "nobody/empty", 100, hub=HubDataset(None, None, "train", ()))
    with pytest.raises(DataError, match=r"nobody/empty .*cannot be loaded: MemoryError: \(no message\)"):
        extent(item)
