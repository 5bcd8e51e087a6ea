"""A run and its export are the same assistant; what is neither, or damaged, is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from answering import network_of
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from saved_run import whole_stage, write_run

from rxt_dist.checkpoint.export import EXPORT_FILE, Wanted, export_run
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.errors import CheckpointError, ConfigError, DataError, UserError
from rxt_dist.inference import Assistant, Sampling


@pytest.fixture(autouse=True)
def _stages() -> Iterator[None]:
    with whole_stage():
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose tokenizer lies with its data."""
    made = write_run(tmp_path / "run", network_of(), data=tmp_path)
    byte_tokenizer(tmp_path / "tokenizer.json")
    return made


def test_a_run_and_its_exports_are_one_assistant(run: Path, tmp_path: Path) -> None:
    export_run(Wanted(run, tmp_path / "export"), lambda line: None)
    export_run(Wanted(run, tmp_path / "half", dtype=torch.bfloat16), lambda line: None)
    of_run, of_export, of_half = (Assistant.load(tmp_path / name) for name in ("run", "export", "half"))
    assert of_run.identity == of_export.identity
    assert of_run.identity != of_half.identity, "rounded weights are other weights"
    answers = []
    for assistant in (of_run, of_export):
        session = assistant.session(seed=4)
        answers.append(assistant.answer([session], ["hello"], Sampling(temperature=1.0, max_tokens=9)))
        session.save(tmp_path / "session")
        assert of_run.load_session(tmp_path / "session").turn == 1
    assert answers[0] == answers[1]


def test_an_export_that_is_half_written_or_damaged(run: Path, tmp_path: Path) -> None:
    export_run(Wanted(run, tmp_path / "export"), lambda line: None)
    (weights,) = (tmp_path / "export").glob("*.safetensors")
    for name, damage in {
        "half written": lambda copy: (copy / EXPORT_FILE).unlink(),
        "no weights": lambda copy: (copy / weights.name).unlink(),
        "torn": lambda copy: (copy / weights.name).write_bytes(weights.read_bytes()[:-1]),
        "header": lambda copy: (copy / weights.name).write_bytes(b"\xff" * 9 + weights.read_bytes()[9:]),
        "model": lambda copy: (copy / "model.yaml").write_text("name: x"),
        "tokenizer": lambda copy: byte_tokenizer(copy / "tokenizer.json", SPECIAL_TOKENS | {"a": 11}),
    }.items():
        copy = tmp_path / name
        shutil.copytree(tmp_path / "export", copy)
        damage(copy)
        with pytest.raises(UserError) as refused:
            Assistant.load(copy)
        assert refused.value.exit_code in (64, 65)
        assert isinstance(refused.value, ConfigError if name == "half written" else CheckpointError), name


def test_weights_of_another_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should somebody vouch for a folder of his own making."""
    export_run(Wanted(run, tmp_path / "export"), lambda line: None)
    monkeypatch.setattr("rxt_dist.inference.load.verify_export", lambda place: {"format": "rxt"})
    (weights,) = (tmp_path / "export").glob("*.safetensors")
    tensors = load_file(weights)
    head = tensors.pop("lm_head.output.bias")
    wrong_ones = ({}, {"lm_head.output.bias": head[:-1].clone()}, {"lm_head.output.bias": head, "more": head.clone()})
    for wrong in (tensors | changed for changed in wrong_ones):
        save_file(wrong, weights)
        with pytest.raises(CheckpointError, match="not of the model"):
            Assistant.load(tmp_path / "export")
    weights.write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        Assistant.load(tmp_path / "export")


def test_places_that_are_neither(run: Path, tmp_path: Path) -> None:
    for place in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="neither the directory of a run"):
            Assistant.load(place)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        Assistant.load(run)


def test_a_model_that_cannot_answer(tmp_path: Path) -> None:
    """A run of joint pre-training has no memory attention yet."""
    byte_tokenizer(tmp_path / "tokenizer.json")
    network = network_of()
    network.memory_attention = None
    run = write_run(tmp_path / "run", network, "joint", data=tmp_path)
    with pytest.raises(DataError, match="has no memory_attention here"):
        Assistant.load(run)
