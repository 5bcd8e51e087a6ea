"""Places that cannot be written to are refused in words, before any work is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data_prep.commands import app
from data_prep.synthetic import write_sample
from rxt_dist.errors import UserError


def _message(*arguments: object) -> str:
    """What a verb that must refuse says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, UserError), (arguments, result.output, result.exception)
    return str(result.exception)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outputs")
    write_sample(root / "corpus", 40_000)
    (root / "chat.en.jsonl").write_text(json.dumps({"query": "q", "answer": "a"}) + "\n")
    for arguments in (
        ("tokenizer", root / "corpus", "--out", root / "t.json", "--vocab-size", 300),
        ("build", root / "corpus", "--out", root / "data", "--tokenizer", root / "t.json", "--workers", 1),
        ("export-megatron", root / "data", "--out", root / "m"),
    ):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, (arguments, result.output, result.exception)
    return root


@pytest.mark.parametrize("place", ["FILE", "FILE/below/it"])
def test_a_file_is_no_folder_for_a_dataset(root: Path, tmp_path: Path, place: str) -> None:
    file = tmp_path / "FILE"
    file.write_text("mine")
    out, tokenizer = tmp_path / place, ("--tokenizer", root / "t.json")
    for arguments in (
        ("build", root / "corpus", *tokenizer),
        ("interactions", root / "chat.en.jsonl", *tokenizer, "--seq-len", 64),
        ("import-megatron", root / "m-en-train", *tokenizer, "--seq-len", 64),
        ("repack", root / "data", "--seq-len", 64),
        ("export-megatron", root / "data"),
        ("tokenizer", root / "corpus"),
    ):
        if place == "FILE" and arguments[0] in ("export-megatron", "tokenizer"):
            continue  # a prefix beside that file, and a file to be replaced
        assert f"{file} is a file" in _message(*arguments, "--out", out)
    message = _message("tokenizer", root / "corpus", "--out", tmp_path / "t.json", "--report", out)
    assert f"{file} is a file" in message
    assert list(tmp_path.iterdir()) == [file]
    assert file.read_text() == "mine"


@pytest.mark.parametrize("place", ["/proc/rxt", "LONG/x", "LINK/x"])
def test_a_place_that_cannot_be_written_to_is_refused_by_every_verb(root: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "LINK").symlink_to(tmp_path / "nowhere")
    before = sorted(root.rglob("*"))
    out, tokenizer = tmp_path / place.replace("LONG", "x" * 300), ("--tokenizer", root / "t.json")
    for arguments in (
        ("sample", out),
        ("sample", tmp_path / "corpus", "--interactions", out),
        ("tokenizer", root / "corpus", "--out", out / "t.json"),
        ("tokenizer", root / "corpus", "--out", tmp_path / "t.json", "--report", out),
        ("build", root / "corpus", *tokenizer, "--out", out),
        ("stats", root / "data", "--plots", out),
        ("repack", root / "data", "--seq-len", 64, "--out", out),
        ("interactions", root / "chat.en.jsonl", *tokenizer, "--seq-len", 64, "--out", out),
        ("import-megatron", root / "m-en-train", *tokenizer, "--seq-len", 64, "--out", out),
        ("export-megatron", root / "data", "--out", out / "m"),
    ):
        message = _message(*arguments)
        assert "cannot be written to" in message or "is a link to nothing" in message, arguments
        assert str(out) in message
    assert list(tmp_path.iterdir()) == [tmp_path / "LINK"]
    assert sorted(root.rglob("*")) == before


def test_too_little_space_is_found_before_the_work(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**4))  # type: ignore[attr-defined]
    for arguments in (
        ("sample", tmp_path / "corpus"),
        ("sample", tmp_path / "corpus", "--interactions", tmp_path / "chats"),
        ("tokenizer", root / "corpus", "--out", tmp_path / "t.json"),
    ):
        assert "but only 10.0 KB is free there" in _message(*arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_no_file_for_a_tokenizer(root: Path, tmp_path: Path) -> None:
    for more in ((), ("--import", root / "t.json")):
        assert f"{tmp_path} is a folder" in _message("tokenizer", root / "corpus", "--out", tmp_path, *more)
    assert not list(tmp_path.iterdir())


def test_a_prefix_needs_a_name(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", "/", "..", str(tmp_path / "here"), f"{tmp_path}/new/", "new/"):
        message = _message("export-megatron", root / "data", "--out", out)
        assert f"--out is '{out}'" in message
        assert "names a folder" in message
    assert [path.name for path in tmp_path.rglob("*")] == ["here"]


def test_a_dataset_is_not_written_among_its_texts(root: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(root / "corpus", corpus)
    shutil.copy(root / "chat.en.jsonl", corpus / "chat.en.jsonl")
    before = sorted(tmp_path.rglob("*"))
    data_file = tmp_path / "data.yaml"
    sources = [{"name": "a", "inputs": [str(corpus / "en" / "*")]}, {"name": "b", "inputs": [str(corpus / "pl")]}]
    tokenizer = ("--tokenizer", root / "t.json")
    for arguments in (
        ("build", corpus, "--out", corpus / "out", *tokenizer),
        ("build", corpus / "en" / "*", "--out", corpus / "en" / "new" / "out", *tokenizer),
        ("interactions", corpus, "--out", corpus / "out", *tokenizer, "--seq-len", 64),
    ):
        assert "lies within the input" in _message(*arguments)
    for place in ("pl/out", "en/out"):
        data_file.write_text(
            json.dumps({"path": str(corpus / place), "seq_len": 64, "build": {"sources": sources, "vocab_size": 300}})
        )
        assert "lies within the input" in _message("build", data_file)
    data_file.unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_build_that_was_begun_among_its_texts_is_not_continued(root: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(root / "corpus", corpus)
    shutil.copytree(root / "data", corpus / "out")
    (corpus / "out" / "dataset.json").unlink()
    message = _message("build", corpus, "--out", corpus / "out", "--tokenizer", root / "t.json")
    assert "can be moved there" in message


def test_a_tokenizer_is_not_written_as_text(root: Path, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("mine")
    for name in ("mine.txt", "x.jsonl", "X.Parquet"):
        assert "would be read as text" in _message("tokenizer", root / "corpus", "--out", tmp_path / name)
    assert (text.read_text(), list(tmp_path.iterdir())) == ("mine", [text])
