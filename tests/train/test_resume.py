"""Where a life of a run begins: its position, the weights it has before an engine takes them, and their origin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from training_run import TinyRun, build_shards

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.config.run import ParallelConfig, RunConfig
from rxt_dist.data.sampler import DataState
from rxt_dist.engine.build import build_engine
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import CheckpointError, DataError, ExitCode
from rxt_dist.model.init import InitialWeights, initialise
from rxt_dist.ranks import Ranks
from rxt_dist.stages.base import Stage, build_network, stage_class
from rxt_dist.train.candidates import Candidates
from rxt_dist.train.resume import Beginning, Position, choose_beginning, position_of, set_weights
from rxt_dist.train.run import train
from rxt_dist.train.signals import StopRequest

ALONE = Collectives(torch.device("cpu"))
STEPS = 2


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A run that has been trained to its end."""
    folder = tmp_path_factory.mktemp("first")
    tiny = TinyRun(folder, build_shards(folder), STEPS)
    assert trained(tiny) == ExitCode.DONE
    return tiny


def trained(tiny: TinyRun, *overrides: str) -> ExitCode:
    config = load_run(tiny.file, list(overrides))
    return train(config, Ranks(0, 1, 0), StopRequest(tiny.folder / "STOP"))


def newest(directory: Path) -> Checkpoint:
    checkpoint = CheckpointStore(directory / "checkpoints", 2).latest_valid(pytest.fail)
    assert checkpoint is not None
    return checkpoint


def stage_of(config: RunConfig) -> Stage:
    return stage_class(config)(build_network(config), config)


def begun(config: RunConfig) -> tuple[Stage, Engine, Beginning]:
    """The beginning of a run in one process of plain torch, from a network without weights."""
    with torch.device("meta"):
        stage = stage_of(config)
    initial = InitialWeights(stage.model, config.seed)
    beginning = choose_beginning(config, None, ALONE)
    frozen = FrozenWeights(stage.model, ALONE)
    alone = config.model_copy(update={"parallel": ParallelConfig(engine="plain", zero=0)})
    engine = build_engine(stage, alone, torch.device("cpu"))
    set_weights(engine, frozen, config, initial, beginning)
    return stage, engine, beginning


def weights_of(stage: Stage) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in stage.model.named_parameters()}


def initialised(config: RunConfig) -> dict[str, Tensor]:
    model = build_network(config)
    initialise(model, config.seed)
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def same(mine: dict[str, Tensor], other: dict[str, Tensor], *parts: str) -> bool:
    """Whether two networks agree in the parameters of these parts; no part: in all."""
    names = [name for name in mine if not parts or name.split(".")[0] in parts]
    assert names
    return all(torch.equal(mine[name], other[name]) for name in names)


@pytest.mark.slow
def test_a_new_run_begins_with_the_weights_of_its_seed(first: TinyRun) -> None:
    config = load_run(first.file)
    stage, _, beginning = begun(config)
    assert beginning == Beginning()
    assert same(weights_of(stage), initialised(config))


def test_weights_that_are_taken_over_stay_and_the_others_begin_afresh(first: TinyRun) -> None:
    start = f"start={{run: {first.directory}, parts: [embedding, decoder]}}"
    config = load_run(first.file, ["name=second", "seed=5", start])
    stage, _, beginning = begun(config)
    origin = beginning.origin
    found, fresh = weights_of(stage), initialised(config)
    taken, _, _ = begun(load_run(first.file, ["seed=5", start]))
    assert same(found, weights_of(taken)), "the same whenever it is done"
    assert same(found, fresh, "lm_head", "encoder", "mlm_head")
    assert not same(found, fresh, "embedding")
    assert not same(found, fresh, "decoder")
    saved = newest(first.directory)
    assert origin == {
        "path": str(first.directory),
        "run_id": saved.meta["run_id"],
        "step": STEPS,
        "digest": saved.digest,
        "parts": ("embedding", "decoder"),
    }
    (said,) = beginning.remarks
    assert f"embedding, decoder from step {STEPS} of {first.directory}; afresh: lm_head, encoder, mlm_head" in said


def test_a_run_that_resumes_looks_for_its_origin_in_its_own_checkpoint(first: TinyRun) -> None:
    """The start names a run that is not there any more."""
    config = load_run(first.file, [f"start={{run: {first.folder}/gone, parts: [decoder]}}"])
    saved = newest(first.directory)
    origin = {"path": "gone", "step": 3}
    resumed = Checkpoint(7, saved.path, {**saved.meta, "origin": origin}, saved.files, saved.digest)
    assert choose_beginning(config, resumed, ALONE) == Beginning(origin)
    assert choose_beginning(config, saved, ALONE) == Beginning()


@pytest.mark.slow
def test_the_origin_is_in_environment_and_in_every_checkpoint_of_every_life(first: TinyRun, tmp_path: Path) -> None:
    """Also once the origin itself is gone."""
    origin_run = tmp_path / "origin"
    shutil.copytree(first.directory, origin_run)
    digest = newest(origin_run).digest
    second = TinyRun(tmp_path, first.shards, STEPS)
    start = f"start={{run: {origin_run}, parts: [embedding, decoder, lm_head]}}"
    often = "checkpoint.every_tokens=512"
    assert trained(second, start, often) == ExitCode.DONE
    assert trained(second, start, often) == ExitCode.DONE
    shutil.rmtree(origin_run)
    # The rest of a longer life; the newest checkpoint is put away, so that there is something left to train.
    shutil.rmtree(second.directory / f"checkpoints/step-{STEPS:08d}")
    (second.directory / "events.jsonl").unlink()
    environment = second.directory / "environment.json"
    assert json.loads(environment.read_text())["origin"]["digest"] == digest
    environment.unlink()
    assert trained(second, start, often) == ExitCode.DONE
    assert second.events("resume")[0]["step"] == STEPS - 1
    found = json.loads(environment.read_text())["origin"]
    assert (found["path"], found["step"], found["digest"]) == (str(origin_run), STEPS, digest)
    checkpoints = sorted((second.directory / "checkpoints").glob("step-*"))
    assert len(checkpoints) == STEPS
    for path in checkpoints:
        assert json.loads((path / "manifest.json").read_text())["meta"]["origin"] == found


def test_checkpoints_of_a_run_from_nothing_name_no_origin(first: TinyRun) -> None:
    assert "origin" not in newest(first.directory).meta
    assert "origin" not in json.loads((first.directory / "environment.json").read_text())


def test_a_position_is_what_was_saved(first: TinyRun) -> None:
    saved = newest(first.directory)
    source = stage_class(load_run(first.file)).source(load_run(first.file))
    position = position_of(saved, source)
    assert (position.step, position.applied, position.row) == (STEPS, STEPS, 8 * STEPS)
    assert 0 < position.tokens_seen <= position.row * source.row_tokens
    assert position.skipped_in_a_row == 0


def test_a_position_of_another_version_or_on_other_data_is_refused(first: TinyRun) -> None:
    saved = newest(first.directory)
    source = stage_class(load_run(first.file)).source(load_run(first.file))
    newer = {**saved.meta, "position": {**saved.meta["position"], "epoch": 3}}
    with pytest.raises(CheckpointError, match="which this version of the program does not understand"):
        position_of(Checkpoint(2, saved.path, newer, saved.files, saved.digest), source)
    other: Any = SimpleNamespace(order=source.order, digests=["0" * 64])
    with pytest.raises(DataError):
        position_of(saved, other)
    assert position_of(saved, source) != Position()
    assert DataState.from_dict(saved.meta["data"]).to_dict() == saved.meta["data"]


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_again(first: TinyRun, tmp_path: Path) -> None:
    assert Candidates(ALONE, CheckpointStore(tmp_path / "nothing", 2), None).first() is None
    copy = tmp_path / "checkpoints"
    shutil.copytree(first.directory / "checkpoints", copy)
    candidates = Candidates(ALONE, CheckpointStore(copy, 2), None)
    found = candidates.first()
    assert found is not None
    assert (found.step, candidates.remarks) == (STEPS, [])
    for path in copy.rglob("rank-*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is valid, and this run will not start again from nothing"):
        Candidates(ALONE, CheckpointStore(copy, 2), None).first()


@pytest.mark.parametrize("kind", ["run", "export"])
def test_a_start_in_bfloat16_begins_with_the_weights_as_they_were(kind: str, first: TinyRun, tmp_path: Path) -> None:
    """An engine makes its float32 weights of rounded ones; those that were learnt before are not rounded."""
    stage = stage_of(load_run(first.file))
    saved = SavedPieces(newest(first.directory))
    for name, parameter in stage.model.named_parameters():
        saved.fill("weight", name, 0, parameter.data.view(-1))
    learnt = weights_of(stage)
    save_file(learnt, tmp_path / "model.safetensors")
    place = first.directory if kind == "run" else tmp_path
    start = f"start={{{kind}: {place}, parts: [embedding, decoder]}}"
    config = load_run(first.file, ["train.precision=bfloat16", start])
    stage, engine, _ = begun(config)
    rounded = 0
    for fragment in engine.fragments(owned=True):
        found = fragment.tensors["weight"].view_as(learnt[fragment.name])
        if fragment.name.split(".")[0] in ("embedding", "decoder"):
            assert torch.equal(found, learnt[fragment.name]), fragment.name
            rounded += not torch.equal(found, found.bfloat16().float())
    assert rounded > 5, "rounding would show"
    for name, value in weights_of(stage).items():
        if name.split(".")[0] in ("embedding", "decoder"):
            assert torch.equal(value, learnt[name].bfloat16())
