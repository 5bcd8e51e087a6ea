"""Exported weights are those of the checkpoint, and another run can begin with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import make_stage, run_config

from rxt_dist.checkpoint import export, tensor_file
from rxt_dist.checkpoint.export import export_weights
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.start import check_start, choose_origin, fill_from
from rxt_dist.checkpoint.state import save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.run import StartConfig
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError, ConfigError, DiskError

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """A run with two checkpoints, and the weights of the second."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
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
        "data": {"path": "none"},
        "train": {"total_tokens": 10**6, "global_batch_tokens": 256},
        "checkpoint": {"every_tokens": 256},
    }
    (directory / "config.resolved.yaml").write_text(yaml.safe_dump(content))
    return directory, {name: value.detach() / (1 + 2 / 3) for name, value in stage.model.named_parameters()}


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
    records = export_weights(run, None, tmp_path / "out", torch.float32, said.append)
    assert len(records) > 3
    assert "step-00000002" in said[0]
    found = exported(tmp_path / "out")
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=name)
    told = json.loads((tmp_path / "out/export.json").read_text())
    assert (told["step"], told["run_id"], told["dtype"]) == (2, "abc", "float32")
    assert [file["name"] for file in told["files"]] == sorted(path.name for path in (tmp_path / "out").glob("model-*"))


def test_another_run_begins_with_them(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    export_weights(run, 1, tmp_path / "out", torch.float32, lambda _: None)
    stage = make_stage(run_config())
    start = StartConfig(export=tmp_path / "out", parts=("embedding", "decoder"))
    check_start(start, stage.model)
    assert choose_origin(start, pytest.fail).step is None
    found = exported(tmp_path / "out")
    runs = [(name, 0, value.data.view(-1).zero_()) for name, value in stage.model.named_parameters()]
    fill_from(start, None, [run for run in runs if run[0].split(".")[0] in start.parts])
    for name, value in stage.model.named_parameters():
        taken = name.split(".")[0] in start.parts
        assert torch.equal(value, found[name] if taken else torch.zeros_like(value)), name


def test_bfloat16_is_rounded_once(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    export_weights(run, 2, tmp_path / "full", torch.float32, lambda _: None)
    export_weights(run, 2, tmp_path / "half", torch.bfloat16, lambda _: None)
    full, half = exported(tmp_path / "full"), exported(tmp_path / "half")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in full.items())


def test_nothing_is_written_over(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("out", "file"):
        with pytest.raises(ConfigError, match="is there already"):
            export_weights(run, 2, tmp_path / name, torch.float32, lambda _: None)
    (tmp_path / "empty").mkdir()
    export_weights(run, 2, tmp_path / "empty", torch.float32, lambda _: None)
    assert exported(tmp_path / "empty")


def test_a_damaged_or_missing_checkpoint_is_not_exported(saved: tuple[Path, Weights], tmp_path: Path) -> None:
    run, _ = saved
    with pytest.raises(CheckpointError, match=r"Step 7 of .* no such checkpoint"):
        export_weights(run, 7, tmp_path / "out", torch.float32, lambda _: None)
    with pytest.raises(CheckpointError, match="no valid checkpoint"):
        export_weights(tmp_path, None, tmp_path / "out", torch.float32, lambda _: None)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(
    saved: tuple[Path, Weights], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file.os, "fsync", full)
    with pytest.raises(DiskError, match="Nothing was exported"):
        export_weights(saved[0], 2, tmp_path / "out", torch.float32, lambda _: None)
    assert list(tmp_path.iterdir()) == []
