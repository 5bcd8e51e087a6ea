"""Beginning with the weights of a run or an export: what fits, what is refused, what is taken and recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from training_run import TinyRun

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.start import Origin, check_start, check_tokenizer, choose_origin, chosen_checkpoints, fill_from
from rxt_dist.checkpoint.state import save_state
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_run, resolved_yaml
from rxt_dist.config.run import RunConfig, StartConfig
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.plain import PlainEngine
from rxt_dist.errors import CheckpointError, ConfigError, DataError
from rxt_dist.model.init import initialise
from rxt_dist.stages.base import build_network, stage_class

CPU = torch.device("cpu")
PARTS = ("embedding", "decoder", "lm_head")


def config_of(folder: Path, *overrides: str) -> RunConfig:
    return load_run(TinyRun(folder, folder / "shards").file, list(overrides))


def network(config: RunConfig, seed: int = 7) -> nn.Module:
    model = build_network(config)
    initialise(model, seed)
    return model


def runs_of(model: nn.Module) -> Iterator[tuple[str, int, Tensor]]:
    """The parameters of `PARTS`, each in three pieces that know nothing of its rows, the last first."""
    for name, parameter in model.named_parameters():
        if name.split(".")[0] in PARTS:
            flat = parameter.data.view(-1)
            first, second = flat.numel() // 3, 2 * flat.numel() // 3 + 1
            yield name, second, flat[second:]
            yield name, 0, flat[:first]
            yield name, first, flat[first:second]


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run with checkpoints after one and two steps, which differ in one weight."""
    config = config_of(tmp_path_factory.mktemp("other"))
    stage = stage_class(config)(build_network(config), config)
    initialise(stage.model, 1)
    engine, frozen = PlainEngine(stage, config, CPU), FrozenWeights(stage.model, Collectives(CPU))
    store = CheckpointStore(config.directory / "checkpoints", 2)
    config.directory.mkdir(parents=True)
    (config.directory / "config.resolved.yaml").write_text(resolved_yaml(config))
    for step in (1, 2):
        with torch.no_grad():
            next(stage.model.parameters())[0, 0] = float(step)
        save_state(engine, frozen, store, step, {"run_id": "0123abcd"})
    (config.directory / "finished.json").write_text('{"step": 2}')
    return config.directory


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """Two files with all parameters of a network."""
    folder = tmp_path / "export"
    folder.mkdir()
    values = weights_of(network(config_of(tmp_path), seed=3))
    names = sorted(values)
    for number, half in enumerate((names[::2], names[1::2])):
        save_file({name: values[name] for name in half}, folder / f"model-{number}.safetensors")
    return folder


def start_of(place: Path, parts: Any = PARTS) -> StartConfig:
    """From a run, where the folder is one, or else from an export."""
    if (place / "config.resolved.yaml").exists():
        return StartConfig(run=place, parts=parts)
    return StartConfig(export=place, parts=parts)


def refusal(start: StartConfig, config: RunConfig) -> str:
    with torch.device("meta"):
        model = build_network(config)
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        check_start(start, model)
    return str(caught.value)


def rewritten(exported: Path, change: Any) -> None:
    """Replace an export by one file of which `change` has altered the tensors."""
    values = weights_of(network(config_of(exported.parent), seed=3))
    change(values)
    for path in exported.iterdir():
        path.unlink()
    save_file(values, exported / "model.safetensors")


@pytest.mark.parametrize("kind", ["run", "export"])
def test_named_parts_are_taken_and_no_other(kind: str, other: Path, exported: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    start = start_of(other if kind == "run" else exported)
    with torch.device("meta"):
        check_start(start, build_network(config))
    model = network(config)
    before = weights_of(model)
    source = weights_of(network(config, seed=1 if kind == "run" else 3))
    if kind == "run":
        source["embedding.weight"][0, 0] = 2.0  # the newest checkpoint
    origin = choose_origin(start, pytest.fail)
    checkpoint = chosen_checkpoints(start, origin)
    fill_from(start, checkpoint, runs_of(model))
    for name, value in weights_of(model).items():
        assert torch.equal(value, (source if name.split(".")[0] in PARTS else before)[name]), name
    changed = {name.split(".")[0] for name, value in weights_of(model).items() if not torch.equal(value, before[name])}
    assert changed == set(PARTS)
    assert (origin.path, origin.parts) == (str(start.run or start.export), PARTS)


def test_the_origin_is_the_newest_valid_checkpoint_by_id_step_and_digest(other: Path) -> None:
    origin = choose_origin(start_of(other), pytest.fail)
    (checkpoint,) = chosen_checkpoints(start_of(other), origin)
    assert checkpoint is not None
    found = CheckpointStore(other / "checkpoints", 2).latest_valid(pytest.fail)
    assert found is not None
    assert (origin.run_id, origin.step, origin.digest) == ("0123abcd", 2, found.digest)
    assert len(origin.digest) == 64
    assert origin.to_dict() == {
        "path": str(other),
        "run_id": "0123abcd",
        "step": 2,
        "digest": found.digest,
        "parts": PARTS,
    }


def test_a_damaged_checkpoint_is_passed_over_and_said(other: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    (newest,) = (copy / "checkpoints/step-00000002").glob("rank-*.safetensors")
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)
    said: list[str] = []
    origin = choose_origin(start_of(copy), said.append)
    assert origin.step == 1
    assert len(said) == 1
    for path in (copy / "checkpoints/step-00000001").glob("rank-*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="has no valid checkpoint to begin from"):
        choose_origin(start_of(copy), said.append)


def test_a_checkpoint_that_is_pruned_after_it_was_chosen_is_named(other: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    origin = choose_origin(start_of(copy), pytest.fail)
    checkpoint = chosen_checkpoints(start_of(copy), origin)
    shutil.rmtree(copy / "checkpoints/step-00000002")
    with pytest.raises(
        CheckpointError, match=r"step-00000002 was removed while .*Start again: the newest one is taken"
    ):
        fill_from(start_of(copy), checkpoint, runs_of(network(config_of(tmp_path))))
    with pytest.raises(CheckpointError, match="step-00000002"):
        chosen_checkpoints(start_of(copy), origin)


def test_the_digest_of_an_export_is_that_of_its_contents(exported: Path) -> None:
    start = start_of(exported)
    origin = choose_origin(start, pytest.fail)
    assert chosen_checkpoints(start, origin) == (None,)
    assert (origin.run_id, origin.step, len(origin.digest)) == (None, None, 64)
    assert choose_origin(start, pytest.fail).digest == origin.digest
    path = exported / "model-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert choose_origin(start, pytest.fail).digest != origin.digest


def test_a_part_that_is_not_there_is_refused_with_those_that_are(other: Path, tmp_path: Path) -> None:
    text = refusal(start_of(other, ("decoder", "memory_attention")), config_of(tmp_path))
    assert f"start.parts names memory_attention, but start.run {other} holds only" in text
    assert "decoder, embedding, encoder, lm_head, mlm_head" in text


@pytest.mark.parametrize("kind", ["run", "export"])
def test_shapes_are_compared_element_by_element(kind: str, other: Path, exported: Path, tmp_path: Path) -> None:
    text = refusal(start_of(other if kind == "run" else exported), config_of(tmp_path, "model.vocab_size=640"))
    assert "of other shapes: " in text
    assert "embedding.weight is [600, 32] there and [640, 32] here" in text
    assert "lm_head.output.bias is [600] there and [640] here" in text
    assert "missing" not in text


def test_all_that_is_missing_on_either_side_is_listed(exported: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Tensor]) -> None:
        del values["lm_head.output.bias"]
        for number in range(6):
            values[f"decoder.further.{number}"] = torch.zeros(1)
        values["encoder.further"] = torch.zeros(1)

    rewritten(exported, change)
    text = refusal(start_of(exported), config_of(tmp_path))
    assert "missing there: lm_head.output.bias, missing here: decoder.further.0; decoder.further.1;" in text
    assert "decoder.further.3; and 2 more." in text
    assert "encoder.further" not in text, "a part that is not taken may look as it likes"


@pytest.mark.parametrize("side", ["there", "here"])
def test_one_parameter_too_many_or_too_few_is_refused(side: str, exported: Path, tmp_path: Path) -> None:
    def change(values: dict[str, Tensor]) -> None:
        if side == "there":
            del values["decoder.head_norm.weight"]
        else:
            values["decoder.further"] = torch.zeros(1)

    rewritten(exported, change)
    name = "decoder.head_norm.weight" if side == "there" else "decoder.further"
    assert f"Parameters missing {side}: {name}. " in refusal(start_of(exported), config_of(tmp_path))


def test_a_run_of_another_depth_is_refused(other: Path, tmp_path: Path) -> None:
    """Its configuration tells, before any weight is read."""
    text = refusal(start_of(other), config_of(tmp_path, "model.layers=4"))
    assert "missing there: decoder.layers." in text


def test_places_that_hold_no_weights_are_refused(other: Path, exported: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path)
    nowhere = tmp_path / "nowhere"
    assert f"{nowhere} holds no run" in refusal(StartConfig(run=nowhere, parts=PARTS), config)
    text = refusal(StartConfig(export=nowhere, parts=PARTS), config)
    assert f"start.export is {nowhere}, which holds no .safetensors file" in text
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "config.resolved.yaml").write_text((other / "config.resolved.yaml").read_text())
    assert "has no committed checkpoint that is whole" in refusal(start_of(fresh), config)
    (exported / "more.safetensors").write_bytes((exported / "model-0.safetensors").read_bytes())
    assert "twice; the second time in more.safetensors" in refusal(start_of(exported), config)
    (exported / "more.safetensors").write_bytes(b"\0" * 100)
    assert "more.safetensors cannot be read as safetensors" in refusal(start_of(exported), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_export_of_another_precision_is_taken(dtype: torch.dtype, exported: Path, tmp_path: Path) -> None:
    config, start = config_of(tmp_path), start_of(exported)
    rewritten(exported, lambda values: values.update({name: value.to(dtype) for name, value in values.items()}))
    model = network(config)
    with torch.device("meta"):
        check_start(start, build_network(config))
    fill_from(start, (None,), runs_of(model))
    wanted = weights_of(network(config, seed=3))["embedding.weight"].to(dtype).float()
    assert torch.equal(weights_of(model)["embedding.weight"], wanted)


def test_integers_are_no_weights(exported: Path, tmp_path: Path) -> None:
    """They were divided by scales that stand elsewhere. What is not taken may have any type."""
    rewritten(exported, lambda values: values.update({"encoder.scales": torch.zeros(3, dtype=torch.int8)}))
    with torch.device("meta"):
        check_start(start_of(exported), build_network(config_of(tmp_path)))
    rewritten(exported, lambda values: values.update({"lm_head.output.bias": torch.zeros(600, dtype=torch.int8)}))
    text = refusal(start_of(exported), config_of(tmp_path))
    assert "'lm_head.output.bias' in start.export" in text
    assert "has the type I8" in text


def test_a_run_that_is_not_finished_is_taken_only_if_that_is_said(other: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(other, copy)
    for said in ("", '{"step": 1}'):  # Nothing that can be read; and another checkpoint came after.
        (copy / "finished.json").write_text(said)
        text = refusal(start_of(copy), config_of(tmp_path))
        assert f"start.run {copy} is not finished" in text
        assert "start.unfinished=true" in text
    with torch.device("meta"):
        check_start(StartConfig(run=copy, parts=PARTS, unfinished=True), build_network(config_of(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(value: float, exported: Path) -> None:
    def change(values: dict[str, Tensor]) -> None:
        values["lm_head.output.bias"][17] = value
        values["encoder.layers.0.norm1"] = torch.full((3,), value)  # not taken

    rewritten(exported, change)
    with pytest.raises(
        CheckpointError, match=rf"'lm_head.output.bias' of start.export .* holds {value} \(element 17 of"
    ):
        choose_origin(start_of(exported), pytest.fail)
    assert choose_origin(start_of(exported, ("embedding", "decoder")), pytest.fail).digest


def test_parts_come_from_several_places(other: Path, exported: Path, tmp_path: Path) -> None:
    start = StartConfig.model_validate(
        {
            "run": other,
            "parts": ("embedding",),
            "also": [{"export": exported, "parts": ["decoder", "lm_head"]}],
        }
    )
    config = config_of(tmp_path)
    model = network(config)
    with torch.device("meta"):
        check_start(start, build_network(config))
    origin = choose_origin(start, pytest.fail)
    assert [one.parts for one in Origin.from_dict(origin.to_dict()).all] == [("embedding",), ("decoder", "lm_head")]
    fill_from(start, chosen_checkpoints(start, origin), runs_of(model))
    first, second, taken = weights_of(network(config, 1)), weights_of(network(config, 3)), weights_of(model)
    first["embedding.weight"][0, 0] = 2.0
    for name, value in taken.items():
        source = {"embedding": first, "decoder": second, "lm_head": second}.get(name.split(".")[0])
        assert source is None or torch.equal(value, source[name]), name


def test_a_further_place_is_checked_as_the_first(other: Path, exported: Path, tmp_path: Path) -> None:
    start = StartConfig.model_validate(
        {"run": other, "parts": ("embedding",), "also": [{"export": exported, "parts": ["decoder"]}]}
    )
    text = refusal(start, config_of(tmp_path, "model.layers=4"))
    assert f"parts decoder of start.export {exported} are not those" in text


def test_weights_of_another_tokenizer_are_refused(exported: Path) -> None:
    content = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (exported / "tokenizer.json").write_text(json.dumps(content))
    check_tokenizer(start_of(exported).origins[0], tokenizer_fingerprint(json.dumps(content)))
    with pytest.raises(DataError, match=r"start\.export .* trained with tokenizer .* made with abcd"):
        check_tokenizer(start_of(exported).origins[0], "abcd" * 16)


def test_what_does_not_name_its_tokenizer_is_taken(other: Path, exported: Path) -> None:
    for place in (other, exported):
        check_tokenizer(start_of(place).origins[0], "abcd" * 16)
