from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from data_verbs import as_json, run
from shard_folder import random_corpus, write_folder

from rxt_dist.config.load import load_run
from rxt_dist.config.schedules import steps
from rxt_dist.data.manifest import load_manifest
from rxt_dist.data.masking import mask_for_mlm
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.train.preflight import preflight

_CONFIGS = Path(__file__).parents[3] / "configs"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("show") / "data"
    write_folder(root, random_corpus(51, units=2, documents=300), 32)
    return root


@pytest.fixture(scope="module")
def run_file(dataset: Path) -> Path:
    path = dataset.parent / "run.yaml"
    path.write_text(
        f"""
name: shown
seed: 77
model: {_CONFIGS}/model/demo.yaml
data:
  path: {dataset}
  mixture: [{{weights: {{en: 3, pl: 1}}}}]
  max_epochs: 1000
train:
  total_tokens: 25600
  global_batch_tokens: 512
  ramp: {{start_tokens: 256, increment_tokens: 256, over_tokens: 2560}}
parallel: {{engine: plain, zero: 0}}
checkpoint: {{every_tokens: 6400}}
"""
    )
    return path


def test_it_is_the_row_that_training_reads(dataset: Path, run_file: Path) -> None:
    config = load_run(run_file)
    source = preflight(config, 1)
    sources = set()
    for position in (0, 1, 399, 4096, 5000):
        batch = source.read(np.array([position]), slice(0, 1))
        shown = as_json("show", dataset, "--position", position, "--run", run_file, "--ids")
        ids = [token for document in shown["documents"] for token in document["ids"]]
        assert ids + [0] * shown["padding"] == batch.unpack().tokens_BT[0].tolist()
        assert source.sources[int(batch.source_B[0])].name == shown["source"]
        lengths = [document["length"] for document in shown["documents"]]
        assert lengths + [shown["padding"]] * (shown["padding"] > 0) == np.diff(batch.cu_seqlens).tolist()
        masked, _ = mask_for_mlm(batch.unpack().tokens_BT, batch.samples_B, 77, config.stage.mlm_probability)
        seen = as_json("show", dataset, "--position", position, "--run", run_file, "--ids", "--mlm")
        ids = [token for document in seen["documents"] for token in document["ids"]]
        assert ids == masked[0].tolist()[: len(ids)]
        assert 4 in ids
        assert any("[MASK]" in document["text"] for document in seen["documents"])
        sources.add(shown["source"])
    assert sources == {"en", "pl"}


@pytest.mark.slow
def test_a_step_of_a_run_begins_where_training_begins_it(dataset: Path, run_file: Path) -> None:
    config = load_run(run_file)
    position = 0
    for step, taken in zip(range(1, 13), steps(config.train, 32), strict=False):
        shown = as_json("show", dataset, "--run", run_file, "--step", step)
        assert (shown["position"], shown["step"]) == (position, step)
        rows = taken.rows
        second = as_json("show", dataset, "--run", run_file, "--step", step, "--rank", 1, "--ranks", 2)
        assert (second["position"], second["step"]) == (position + rows // 2, step)
        position += rows
    assert next(steps(config.train, 32)).rows == 8 < rows == 16
    assert as_json("show", dataset, "--run", run_file, "--position", 10_000)["step"] is None


def test_the_place_of_a_row_is_told(dataset: Path) -> None:
    shown = as_json("show", dataset, "--position", 12)
    assert shown["shard"] == f"{shown['source']}/train/{shown['unit']}-000.arrow"
    assert shown["language"] == shown["source"]
    assert shown["inputs"] == []
    rows = as_json("stats", dataset)["totals"]["rows"]
    assert as_json("show", dataset, "--position", 3 * rows)["epoch"] >= 3
    text = run("show", dataset, "--position", 12, "--ids").stdout
    assert f"Position 12 (epoch 0): row {shown['row']} of source {shown['source']}" in text
    assert "ids: " in text


def test_a_data_file_brings_its_mixture(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(f"path: {dataset}\nmixture: [{{weights: {{pl: 1}}}}]\n")
    for position in range(6):
        assert as_json("show", dataset, "--position", position, "--run", tmp_path / "data.yaml")["source"] == "pl"


def test_an_open_last_phase_of_a_data_file_is_shown(dataset: Path, tmp_path: Path) -> None:
    rows, seq_len = sum(source.train.totals.rows for source in load_manifest(dataset).sources), 32
    assert rows < 4096, "the first phase is to be longer than a pass"
    first = f"{{tokens: {4096 * seq_len}, weights: {{en: 1}}}}"
    (tmp_path / "data.yaml").write_text(f"path: {dataset}\nmixture: [{first}, {{weights: {{pl: 1}}}}]\n")
    for position, source in ((0, "en"), (4095, "en"), (4096, "pl"), (4097, "pl"), (20_000, "pl")):
        shown = as_json("show", dataset, "--position", position, "--run", tmp_path / "data.yaml")
        assert shown["source"] == source, position
    # How much of it is read is another question, which hangs on the end.
    for verb in (("stats", dataset, "--run"), ("mix",)):
        error = run(*verb, tmp_path / "data.yaml").exception
        assert "lasts until the end of training, which a data file does not know" in str(error)


def test_rows_of_a_later_phase_are_shown_from_its_dataset(dataset: Path, run_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_folder(other, random_corpus(52, units=1, sources=("de", "en")), 32)
    phases = [{"tokens": 4096 * 32, "by_size": True}, {"path": str(other), "weights": {"en": 1}}]
    content = yaml.safe_load(run_file.read_text())
    content["data"]["mixture"] = phases
    content["train"] |= {"total_tokens": 2 * 4096 * 32, "ramp": None}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(content))
    source = preflight(load_run(path), 1)
    # A step has 16 rows: the 257th is the first of the second phase.
    for step, name, folder in ((256, None, dataset), (257, "en@2", other)):
        shown = as_json("show", dataset, "--run", path, "--step", step, "--ids")
        assert shown["dataset"] == str(folder)
        batch = source.read(np.array([shown["position"]]), slice(0, 1))
        assert shown["source"] == source.sources[int(batch.source_B[0])].name
        assert name in (None, shown["source"])
        ids = [token for document in shown["documents"] for token in document["ids"]]
        assert ids == batch.unpack().tokens_BT[0].tolist()[: len(ids)]
    assert "en@2" in [item["source"] for item in as_json("stats", dataset, "--run", path)["mixture"]]
    mixed = as_json("mix", path)
    assert [phase["dataset"] for phase in mixed["phases"]] == [str(dataset), str(other)]
    drawn = [{item["source"]: item["tokens"] for item in phase["sources"]} for phase in mixed["phases"]]
    assert drawn[0]["en@2"] == drawn[1]["en"] == drawn[1]["de@2"] == 0
    assert drawn[1]["en@2"] == 4096 * 32
    assert f"phase2of{other}" in "".join(run("mix", path).stdout.split())


def test_documents_are_traced_to_their_records(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    lines = [json.dumps({"text": f"document number {n} of a small corpus", "language": "en"}) for n in range(60)]
    (tmp_path / "texts" / "a.jsonl").write_text("\n".join(lines))
    sizes = ("--vocab-size", 300, "--seq-len", 64)
    as_json("build", tmp_path / "texts", "--out", tmp_path / "out", *sizes, "--workers", 1)
    shown = as_json("show", tmp_path / "out", "--position", 1, "--trace")
    assert shown["inputs"] == [str(tmp_path / "texts" / "a.jsonl")]
    for document in shown["documents"]:
        assert document["id"].startswith("texts/a.jsonl#")
        assert f"document number {document['document']} of" in document["text"]
    assert "texts/a.jsonl#" in run("show", tmp_path / "out", "--position", 1, "--trace").stdout


def test_what_cannot_be_is_refused(dataset: Path, run_file: Path) -> None:
    for arguments, kind, message in (
        ((), ConfigError, "either --position or"),
        (("--position", 1, "--step", 1, "--run", run_file), ConfigError, "either --position or"),
        (("--step", 1), ConfigError, "needs --run"),
        (("--step", 99, "--run", run_file), ConfigError, "the run ends before"),
        (("--step", 1, "--run", run_file, "--rank", 2, "--ranks", 2), ConfigError, "--rank is 2"),
        (("--step", 1, "--run", run_file, "--ranks", 3), ConfigError, "cannot share equally"),
        (("--position", 1, "--mlm"), ConfigError, "--mlm needs --run"),
        (("--position", 1, "--run", run_file, "--seed", 3), ConfigError, "seed 77"),
        (("--position", 1, "--trace"), DataError, "cannot be traced"),
    ):
        result = run("show", dataset, *arguments)
        assert isinstance(result.exception, kind), (arguments, result.output)
        assert message in str(result.exception)
