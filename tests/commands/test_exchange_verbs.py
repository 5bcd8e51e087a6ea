"""`rxt-dist export` and `rxt-dist import`, as a person calls them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from answering import network_of
from byte_tokenizer import byte_tokenizer
from saved_run import whole_stage, write_run
from typer.testing import CliRunner

from rxt_dist.cli import app
from rxt_dist.errors import CheckpointError, ConfigError


@pytest.fixture(autouse=True)
def _stages() -> Iterator[None]:
    with whole_stage():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    byte_tokenizer(tmp_path / "tokenizer.json")
    return write_run(tmp_path / "run", network_of(), data=tmp_path)


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_there_and_back(run: Path, tmp_path: Path) -> None:
    said = invoke("export", run, "--out", tmp_path / "theirs", "--format", "rxlm", "--step", "7")
    assert "step-00000007" in said
    assert f"{tmp_path / 'theirs'}/mlm_head/model.safetensors" in said.replace("\n", "")
    said = invoke("import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert "memory attention of" in said
    said = invoke("export", run, "--out", tmp_path / "plain", "--dtype", "bfloat16")
    assert "as bfloat16" in said
    for folder in ("theirs", "ours", "plain"):
        assert not [path for path in (tmp_path / folder).rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dtype", "float16"), "--dtype is 'float16'"),
        (("--format", "onnx"), "--format is 'onnx'"),
    ],
)
def test_values_that_are_none(run: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        invoke("export", run, "--out", tmp_path / "out", *arguments)
    with pytest.raises(ConfigError, match="--rope-angles is 'half'"):
        invoke("import", tmp_path, "--out", tmp_path / "out", "--rope-angles", "half")
    assert not (tmp_path / "out").exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run directory"):
        invoke("export", tmp_path, "--out", tmp_path / "out")
