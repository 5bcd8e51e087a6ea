"""The loss that a checkpoint remembers is that of the loaded model, or the load is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from training_run import TinyRun, build_shards

from rxt_dist.config.load import load_run
from rxt_dist.errors import CheckpointError
from rxt_dist.train import probe
from rxt_dist.train.evaluate import evaluate, evaluate_group
from rxt_dist.train.preflight import preflight
from rxt_dist.train.probe import check_probe, measure_probe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """Engine, stage and data of a run that has not begun."""
    from rxt_dist.engine.plain import PlainEngine
    from rxt_dist.model.init import initialise
    from rxt_dist.stages.base import build_network, stage_class

    folder = tmp_path_factory.mktemp("probe")
    config = load_run(TinyRun(folder, build_shards(folder)).file)
    model = build_network(config)
    initialise(model, 0)
    stage = stage_class(config)(model, config)
    return PlainEngine(stage, config, torch.device("cpu")), stage, preflight(config, 1)


def checkpoint(**saved: Any) -> Any:
    known = {"source": "en", "data": "d", "precision": "float32", "loss": 2.0}
    return SimpleNamespace(path=Path("step-00000007"), meta={"probe": known | saved})


@pytest.mark.slow
def test_it_is_the_mean_loss_of_the_first_group_of_the_first_source(run: tuple[Any, Any, Any]) -> None:
    engine, stage, data = run
    found = measure_probe(engine, stage, data)
    first = evaluate(engine, stage, data, stage.rows_together, 2)[0]
    assert found is not None
    assert (found["source"], found["data"], found["precision"]) == (first.source, data.digests[0], "float32")
    assert found["loss"] == pytest.approx(sum(first.losses.values()) / len(first.losses), rel=1e-6)
    assert measure_probe(engine, stage, data) == found


@pytest.mark.slow
def test_a_source_without_held_out_rows_is_passed_over(
    run: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, stage, data = run
    monkeypatch.setattr(probe, "sources_without_evaluation", lambda *_: ["en"])
    found = measure_probe(engine, stage, data)
    assert found is not None
    assert found["source"] == "pl"
    assert found["loss"] == evaluate_group(engine, stage, data, 1)
    monkeypatch.setattr(probe, "sources_without_evaluation", lambda *_: ["en", "pl"])
    assert measure_probe(engine, stage, data) is None
    monkeypatch.undo()
    monkeypatch.setattr(stage, "terms", ())
    assert measure_probe(engine, stage, data) is None


def checked(monkeypatch: pytest.MonkeyPatch, saved: Any, **found: Any) -> str:
    known = {"source": "en", "data": "d", "precision": "float32", "loss": 2.0}
    monkeypatch.setattr(probe, "measure_probe", lambda *_: known | found)
    nothing: Any = None
    return check_probe(nothing, nothing, nothing, saved)


@pytest.mark.parametrize(
    ("precisions", "loss", "same"),
    [
        (("float32", "float32"), 2.0019, True),
        (("float32", "float32"), 2.0021, False),
        (("float32", "float32"), 1.9979, False),
        (("float32", "bfloat16"), 2.039, True),
        (("bfloat16", "float32"), 2.039, True),
        (("bfloat16", "bfloat16"), 2.041, False),
        (("float32", "float32"), float("nan"), False),
    ],
)
def test_a_difference_that_no_topology_explains_is_refused(
    precisions: tuple[str, str], loss: float, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = checkpoint(precision=precisions[0])
    if same:
        assert f"{loss:.6g}, saved 2" in checked(monkeypatch, saved, precision=precisions[1], loss=loss)
        return
    with pytest.raises(CheckpointError, match=rf"loss of {loss:.6g} .* source 'en', but 2 was saved"):
        checked(monkeypatch, saved, precision=precisions[1], loss=loss)


def test_a_loss_near_zero_may_differ_by_as_much_as_one_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "saved 1e-05" in checked(monkeypatch, checkpoint(loss=1e-5), loss=9e-4)
    with pytest.raises(CheckpointError, match="was saved"):
        checked(monkeypatch, checkpoint(loss=1e-5), loss=2e-3)


def test_what_cannot_be_compared_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    without: Any = SimpleNamespace(path=Path("step-00000007"), meta={})
    assert "so none is compared" in checked(monkeypatch, without)
    assert "rows are others" in checked(monkeypatch, checkpoint(data="other"), loss=9.0)
    assert "rows are others" in checked(monkeypatch, checkpoint(source="pl"), loss=9.0)
    monkeypatch.setattr(probe, "measure_probe", lambda *_: None)
    nothing: Any = None
    assert "rows are others" in check_probe(nothing, nothing, nothing, checkpoint())
