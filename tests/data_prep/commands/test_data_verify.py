from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from data_prep.commands import app
from rxt_dist.errors import ConfigError, DataError


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _json(*arguments: object) -> dict[str, Any]:
    """The JSON that a verb prints, whether or not it ends in an error afterwards."""
    value: dict[str, Any] = json.loads(_run(*arguments, "--json").stdout)
    return value


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verify")
    (root / "texts").mkdir()
    for part in range(2):
        lines = [json.dumps({"text": f"text {n} of part {part}, " * (n % 20 + 1), "language": "en"}) for n in range(80)]
        (root / "texts" / f"{part}.jsonl").write_text("\n".join(lines))
    _json("build", root / "texts", "--out", root / "data", "--vocab-size", 300, "--seq-len", 64, "--workers", 1)
    return root


@pytest.fixture
def dataset(world: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(world / "data", tmp_path / "data"))


def _damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def test_modes(dataset: Path) -> None:
    quick, full = _json("verify", dataset, "--quick"), _json("verify", dataset)
    assert (quick["mode"], full["mode"]) == ("quick", "full")
    assert full["damaged"] == quick["damaged"] == {}
    assert full["root_digest"] == quick["root_digest"]
    assert "is sound" in _run("verify", dataset, "--full", "--threads", 2).stdout
    deep = _json("verify", dataset, "--deep", 10, "--seed", 5)
    assert (deep["mode"], deep["seed"], deep["mismatches"], deep["untraced"]) == ("deep", 5, [], {})
    assert (deep["asked"], deep["documents"], deep["untraced_documents"]) == (10, 10, 0)
    everything = _json("verify", dataset, "--deep", 1000)
    assert (everything["asked"], everything["documents"]) == (1000, 160)
    told = _run("verify", dataset, "--deep", 1000)
    assert "160 of 160 documents" in told.stdout
    assert "Asked for were 1000, but the dataset has no more than 160." in told.stdout
    text = _run("verify", dataset, "--deep", 10)
    assert "documents" in text.stdout
    assert "exactly what their texts give" in text.stdout
    assert "Tracing 10 random" in text.stderr
    assert "nothing reads it" not in text.stdout


def test_damage_is_named_and_repaired(dataset: Path) -> None:
    digest = _json("verify", dataset)["root_digest"]
    shard = next((dataset / "en" / "train").glob("*.arrow"))
    _damage(shard)
    _damage(dataset / "plan.json")
    damaged = {f"en/train/{shard.name}", "plan.json"}
    assert set(_json("verify", dataset)["damaged"]) == damaged
    result = _run("verify", dataset, "--full")
    assert isinstance(result.exception, DataError)
    assert result.exception.exit_code == 65
    assert all(name in str(result.exception) for name in damaged)
    assert set(_json("verify", dataset, "--quick")["damaged"]) == {"plan.json"}
    value = _json("verify", dataset, "--repair")
    assert damaged <= set(value["restored"])
    assert (value["damaged"], value["not_restored"], value["root_digest"]) == ({}, {}, digest)
    assert _json("verify", dataset, "--repair")["damaged"] == {}
    _damage(dataset / "dataset.json")
    text = _run("verify", dataset, "--repair")
    assert text.exit_code == 0
    assert "restored dataset.json" in text.stdout
    assert "is sound" in text.stdout


def test_what_stays_damaged_ends_in_an_error(dataset: Path, world: Path) -> None:
    shard = next((dataset / "en" / "train").glob("*.arrow"))
    _damage(shard)
    (world / "texts").rename(world / "away")
    try:
        result = _run("verify", dataset, "--repair", "--json")
        value = json.loads(result.stdout)
        assert "is gone" in value["not_restored"][f"en/train/{shard.name}"]
        assert isinstance(result.exception, DataError)
        assert "still damaged" in str(result.exception)
        assert "Run the same `rxt-dist data build` again" in str(result.exception)
    finally:
        (world / "away").rename(world / "texts")


def test_texts_that_are_gone_make_deep_fail(dataset: Path, world: Path) -> None:
    (world / "texts").rename(world / "away")
    try:
        result = _run("verify", dataset, "--deep", 3)
        assert isinstance(result.exception, DataError)
        assert "is gone" in str(result.exception)
        assert "0 of 0 documents" in result.stdout
        assert "3 more could not be compared, as their texts cannot be read" in result.stdout
    finally:
        (world / "away").rename(world / "texts")


def test_unknown_files_are_told(dataset: Path) -> None:
    (dataset / "notes.txt").write_text("mine")
    assert _json("verify", dataset, "--quick")["unknown"] == ["notes.txt"]
    assert "unknown file notes.txt" in _run("verify", dataset).stdout


def test_one_mode_at_a_time(dataset: Path) -> None:
    for arguments in (("--quick", "--full"), ("--deep", 2, "--repair"), ("--quick", "--repair")):
        assert isinstance(_run("verify", dataset, *arguments).exception, ConfigError)
    assert isinstance(_run("verify", dataset / "en").exception, DataError)
