"""`rxt-dist data stats`, `diff` and `repack`."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_verbs import as_json, run
from shard_folder import random_corpus, write_folder

from rxt_dist.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stats") / "data"
    write_folder(root, random_corpus(61, units=2, documents=300), 32)
    return root


@pytest.mark.slow
def test_figures_and_pictures(dataset: Path, tmp_path: Path) -> None:
    value = as_json("stats", dataset, "--plots", tmp_path / "figures")
    assert value["scanned"]["whole"]
    assert set(value["sources"]) == {"en", "pl"}
    assert value["sources"]["en"]["splits"]["train"]["documents"] == value["sources"]["en"]["lengths"]["documents"]
    assert value["mixture"] is None
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {Path(path).name for path in value["plots"]}
    assert len(value["plots"]) == 4
    assert "epochs" not in " ".join(value["plots"])
    assert not as_json("stats", dataset, "--sample", 20)["scanned"]["whole"]
    text = run("stats", dataset, "--sample", 20).stdout
    for expected in ("a sample of the rows", "never used need a scan of all rows: --whole", "Languages: "):
        assert expected in text
    assert " 0 of " not in text
    assert "epochs" not in text
    assert "Exact duplicates over all sources: 0 of" in run("stats", dataset).stdout


def test_a_large_dataset_is_sampled_and_that_is_said(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.shards.statistics.WHOLE_TOKENS", 1000)
    monkeypatch.setattr("data_prep.shards.statistics.SAMPLE_ROWS", 30)
    result = run("stats", dataset)
    assert "scanning a sample of 30 rows a source (--whole scans all)" in result.stderr
    assert as_json("stats", dataset, "--whole")["scanned"]["whole"]


@pytest.mark.slow
def test_epochs_of_a_mixture_that_training_would_refuse(dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.yaml"
    file.write_text(f"path: {dataset}\nmixture: [{{tokens: 2000000, weights: {{en: 3, pl: 1}}}}]\n")
    epochs = {item["source"]: item["epochs"] for item in as_json("stats", dataset, "--run", file)["mixture"]}
    assert epochs["en"] > 2 * epochs["pl"] > 8
    told = run("stats", dataset, "--run", file, "--plots", tmp_path / "figures")
    assert "Documents (lengths in tokens) and training" in told.stdout
    assert f"{epochs['en']:.2f}" in told.stdout
    assert (tmp_path / "figures/epochs.png").is_file()
    file.write_text(f"path: {dataset}\nmixture: [{{weights: {{en: 1}}}}]\n")
    error = run("stats", dataset, "--run", file).exception
    assert isinstance(error, ConfigError)
    assert "lasts until the end of training, which a data file does not know: name the run file." in str(error)
    file.write_text(f"path: {dataset}\nmixture: [{{weights: {{de: 1}}}}]\n")
    assert isinstance(run("stats", dataset, "--run", file).exception, ConfigError)


@pytest.mark.slow
def test_repacked_data_differs_and_comes_back(dataset: Path, tmp_path: Path) -> None:
    new = as_json("repack", dataset, "--seq-len", 100, "--out", tmp_path / "new", "--workers", 1)
    assert (new["seq_len"], new["units"], new["units_kept"]) == (100, 2, 0)
    assert new["totals"]["documents"] == as_json("stats", dataset)["totals"]["documents"]
    different = as_json("diff", dataset, tmp_path / "new", code=65)
    assert not different["same"]
    assert {"what": "row length", "first": "32", "second": "100"} in different["differences"]
    again = as_json("repack", dataset, "--seq-len", 100, "--out", tmp_path / "other", "--workers", 2)
    assert again["root_digest"] == new["root_digest"]
    assert as_json("diff", tmp_path / "new", tmp_path / "other") == {
        "same": True, "root_digests": [new["root_digest"]] * 2, "differences": [],
        "documents": {"same": True, "by": "stream", "differing": []},
    }  # fmt: skip
    assert "2 of 2 units were already finished" in run(
        "repack", dataset, "--seq-len", 100, "--out", tmp_path / "new"
    ).stdout  # fmt: skip
    assert "are the same stream" in run("diff", tmp_path / "new", tmp_path / "other").stdout
    text = run("diff", dataset, tmp_path / "new")
    assert text.exit_code == 65
    assert "row length: 32 | 100" in text.stdout


def test_mistakes_are_user_errors(dataset: Path, tmp_path: Path) -> None:
    for arguments, kind in (
        (("stats", tmp_path), DataError),
        (("diff", dataset, tmp_path), DataError),
        (("repack", dataset, "--seq-len", 32, "--out", tmp_path / "x"), ConfigError),
    ):
        assert isinstance(run(*arguments).exception, kind)
