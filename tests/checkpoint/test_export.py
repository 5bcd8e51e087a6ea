"""Exported weights are those of the checkpoint, and another run can begin with them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file
from tiny import make_stage, run_config

from rxt_dist.checkpoint import export
from rxt_dist.checkpoint.export import Wanted, export_run, verify_export
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.start import check_start, choose_origin, fill_from
from rxt_dist.checkpoint.state import save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_model
from rxt_dist.config.run import StartConfig
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError, ConfigError, DataError, DiskError

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A run with two checkpoints, and the weights of the second."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    directory.mkdir()
    config = run_config()
    stage = make_stage(config)
    engine = PlainEngine(stage, config, torch.device("cpu"))
    store = CheckpointStore(directory / "checkpoints", 2)
    for step in (1, 2):
        save_state(engine, FrozenWeights(stage.model, engine.ranks), store, step, {"run_id": "abc", "tokens": 9})
        with torch.no_grad():
            for parameter in stage.model.parameters():
                parameter.mul_(1 + step / 3)
    content = {
        "name": "tiny",
        "model": config.model.model_dump(mode="json"),
        "data": {"path": str(directory)},
        "train": {"total_tokens": 10**6, "global_batch_tokens": 256},
        "checkpoint": {"every_tokens": 256},
    }
    (directory / "config.resolved.yaml").write_text(yaml.safe_dump(content))
    byte_tokenizer(directory / "tokenizer.json")
    return directory, {name: value.detach() / (1 + 2 / 3) for name, value in stage.model.named_parameters()}


def wanted(run: Path, out: Path, **options: Any) -> Wanted:
    return Wanted(run, out, **options)


def exported(folder: Path) -> Weights:
    found: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_whole_parameters_have_their_names_and_values(
    saved: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several files, from blocks that cut parameters."""
    run, weights = saved
    monkeypatch.setattr(export, "_FILE_BYTES", 40_000)
    monkeypatch.setattr(export, "_BLOCK_ELEMENTS", 100)
    said: list[str] = []
    records = export_run(wanted(run, tmp_path / "out"), said.append)
    assert len(records) > 3
    assert "step-00000002" in said[0]
    found = exported(tmp_path / "out")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
    told = json.loads((tmp_path / "out/export.json").read_text())
    assert (told["step"], told["run_id"], told["dtype"]) == (2, "abc", "float32")
    assert [file["name"] for file in told["files"]] == [
        *sorted(path.name for path in (tmp_path / "out").glob("model-*")),
        "model.yaml",
        "tokenizer.json",
    ]


def test_another_run_begins_with_them(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    export_run(wanted(run, tmp_path / "out", step=1), print)
    stage = make_stage(run_config())
    start = StartConfig(export=tmp_path / "out", parts=("embedding", "decoder"))
    check_start(start, stage.model)
    assert choose_origin(start, pytest.fail).step is None
    found = exported(tmp_path / "out")
    runs = [(name, 0, value.data.view(-1).zero_()) for name, value in stage.model.named_parameters()]
    fill_from(start, (None,), [run for run in runs if run[0].split(".")[0] in start.parts])
    for name, value in stage.model.named_parameters():
        taken = name.split(".")[0] in start.parts
        assert torch.equal(value, found[name] if taken else torch.zeros_like(value)), name


def test_bfloat16_is_rounded_once(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    export_run(wanted(run, tmp_path / "full", step=2), print)
    export_run(wanted(run, tmp_path / "half", step=2, dtype=torch.bfloat16), print)
    full, half = exported(tmp_path / "full"), exported(tmp_path / "half")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())


def test_nothing_is_written_over(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("out", "file"):
        with pytest.raises(ConfigError, match="is there already"):
            export_run(wanted(run, tmp_path / name, step=2), print)
    (tmp_path / "empty").mkdir()
    export_run(wanted(run, tmp_path / "empty", step=2), print)
    assert exported(tmp_path / "empty")


def test_a_damaged_or_missing_checkpoint_is_not_exported(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    with pytest.raises(CheckpointError, match=r"Step 7 of .* no such checkpoint"):
        export_run(wanted(run, tmp_path / "out", step=7), print)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        export_run(wanted(tmp_path, tmp_path / "out"), print)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    saved: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="Nothing was exported"):
        export_run(wanted(saved[0], tmp_path / "out", step=2), print)
    assert list(tmp_path.iterdir()) == []


def test_what_lies_beside_the_weights(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    lines = [{"step": 2, "eval/en/true/ar_loss": 1.25}, {"step": 3, "ar_loss": 9.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "ev')
    export_run(wanted(run, tmp_path / "out"), print)
    assert load_model(tmp_path / "out/model.yaml") == run_config().model
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()
    card = (tmp_path / "out/README.md").read_text()
    for part in ("| en/true/ar_loss | 1.25 |", "step 2", "9 tokens", "Licence", "Assistant.load"):
        assert part in card, part
    assert verify_export(tmp_path / "out")["format"] == "rxt"


def test_an_export_that_was_altered_is_found(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    export_run(wanted(run, tmp_path / "out"), print)
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    for path in (weights, tmp_path / "out/model.yaml", tmp_path / "out/tokenizer.json"):
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]):
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match=f"is damaged: {path.name}"):
                verify_export(tmp_path / "out")
        path.write_bytes(content)
    (tmp_path / "out/export.json").write_text('{"files": [{"na')
    with pytest.raises(CheckpointError, match="damaged"):
        verify_export(tmp_path / "out")


def test_another_tokenizer_than_that_of_the_data(
    saved: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named it can be left out; that of the dataset itself was changed, and can be mended."""
    run, _ = saved
    monkeypatch.setattr(export, "DATASET_FILE", "tokenizer.json")  # There is one; what it says is of other data.
    monkeypatch.setattr(export, "load_any_manifest", lambda _: SimpleNamespace(tokenizer_sha256="0" * 64))
    for options, mend in (
        ({"tokenizer": run / "tokenizer.json"}, "Leave out --tokenizer"),
        ({}, f"rxt-dist data verify {re.escape(str(run))} --repair"),
    ):
        with pytest.raises(DataError, match=f"every id would mean something else.*{mend}"):
            export_run(wanted(run, tmp_path / "out", **options), print)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_missing_or_another_models(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    for place, what in (
        (tmp_path / "none.json", "does not exist"),
        (run / "config.resolved.yaml", "is not a tokenizer"),
    ):
        with pytest.raises(DataError, match=what):
            export_run(wanted(run, tmp_path / "out", tokenizer=place), print)
    larger = SPECIAL_TOKENS | {chr(0x4E00 + number): 11 + number for number in range(200)}
    with pytest.raises(DataError, match="the model's vocabulary is 128"):
        export_run(wanted(run, tmp_path / "out", tokenizer=byte_tokenizer(tmp_path / "large.json", larger)), print)
    assert not (tmp_path / "out").exists()
