"""Weights leave in the reference's format and come back bit-equal, in every form that published folders have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from saved_run import whole_stage, write_run
from tiny import model_config
from torch import Tensor

from rxt_dist.checkpoint.export import Wanted, export_run
from rxt_dist.checkpoint.importing import import_published
from rxt_dist.config.load import load_model
from rxt_dist.errors import CheckpointError, ConfigError, DataError
from rxt_dist.inference.load import load_network
from rxt_dist.model.init import initialise
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.model.reference_names import to_reference

SYSTEMS: dict[str, tuple[str, ...]] = {
    "stacked": (),
    "loop": ("decoder.moe={experts: 4, active: 2, hidden: 8, bias: local}", "decoder.attention_bias=true"),
    "single": ("decoder.moe.shared_experts=1", "decoder.moe.shared_bias=local", "decoder.head_norm=layer"),
    "single, no bias": ("decoder.moe.shared_experts=1", "decoder.moe.shared_bias=none", "decoder.moe.bias=none"),
    "ungated": ("decoder.self_attention={query_heads: 2, kv_heads: 1}", "decoder.head_norm=none"),
    "stateless": ("decoder.stateless_before=[moe, dense]", "decoder.stateless_after=[]", "encoder.attention_bias=true"),
    "simple": ("memory_attention={variant: simple, attention: {query_heads: 2, kv_heads: 2}}",),
    "self": ("memory_attention={variant: self, attention: {query_heads: 2, kv_heads: 2}}",),
    "interlayer, linear": (
        "memory_attention={variant: interlayer, attention: {query_heads: 2, kv_heads: 2}, gate: {kind: linear}}",
    ),
    "self-interlayer": (
        "memory_attention={variant: self-interlayer, attention: {query_heads: 2, kv_heads: 2}, "
        "inner_attention: {query_heads: 4, kv_heads: 2}, gate: {kind: static, activation: tanh, per_slot: false}}",
    ),
}
Said = list[str]


@pytest.fixture(autouse=True)
def _stages() -> Iterator[None]:
    with whole_stage():
        yield


def network_of(*overrides: str) -> ReactiveTransformer:
    """Random weights, biases and norms too."""
    network = ReactiveTransformer(model_config("norm_eps=null", *overrides))
    initialise(network, 0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    return network


def exported(network: ReactiveTransformer, folder: Path, stage: str = "whole") -> Path:
    """An export of format rxlm without what our own exports add, so that it is as somebody else's."""
    run = write_run(folder / "run", network, stage)
    out, tokenizer = folder / "theirs", byte_tokenizer(folder / "tokenizer.json")
    export_run(Wanted(run, out, "rxlm", tokenizer=tokenizer), lambda line: None)
    for name in ("export.json", "model.yaml", "README.md", "tokenizer.json"):
        (out / name).unlink()
    return out


def imported(folders: list[Path], out: Path, **options: Any) -> tuple[dict[str, Tensor], Said]:
    said: Said = []
    import_published(folders, out, options.get("tokenizer"), options.get("rope_angles"), said.append)
    network, _ = load_network(out, byte_tokenizer(out.parent / "tokenizer.json"))
    return dict(network.named_parameters()), said


def assert_equal(found: dict[str, Tensor], network: ReactiveTransformer) -> None:
    wanted = dict(network.named_parameters())
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.slow
def test_out_and_back_is_bit_equal(system: str, tmp_path: Path) -> None:
    network = network_of(*SYSTEMS[system])
    out = exported(network, tmp_path)
    found, _ = imported([out], tmp_path / "ours")
    assert_equal(found, network)
    model = load_model(tmp_path / "ours/model.yaml")
    wanted = network.config.model_copy(update={"name": "ours"})
    # What no tensor and no key of a published folder says stays at its default.
    unsaid = {"dense_hidden": True, "moe": {"shared_bias"}}
    assert model.model_dump(exclude={"decoder": unsaid}) == wanted.model_dump(exclude={"decoder": unsaid})


def test_a_system_is_one_folder_and_what_the_reference_cannot_build_is_parts(tmp_path: Path) -> None:
    whole = exported(network_of(), tmp_path / "a")
    assert sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*.safetensors")) == [
        "mlm_head/model.safetensors",
        "model.safetensors",
    ]
    names = load_file(whole / "model.safetensors")
    assert torch.equal(names["decoder.model.embedding.weight"], names["encoder.model.embedding.weight"])
    config = json.loads((whole / "config.json").read_text())
    assert (config["memory_attention_variant"], config["memory_attention_config"]["num_groups"]) == (
        "grouped-self-interlayer",
        2,
    )
    assert config["decoder_config"]["use_vectorized_moe"] is True
    parts = exported(network_of(*SYSTEMS["interlayer, linear"]), tmp_path / "b")
    assert sorted(path.name for path in parts.iterdir()) == ["decoder", "encoder", "memory_attention", "mlm_head"]
    alone = exported(network_of_decoder(), tmp_path / "c", "decoder-only")
    assert sorted(path.name for path in alone.iterdir()) == ["decoder"]


def network_of_decoder() -> ReactiveTransformer:
    network = ReactiveTransformer(model_config("norm_eps=null"), ("embedding", "decoder", "lm_head"))
    initialise(network, 0)
    return network


def test_layouts_are_those_of_the_formulas(tmp_path: Path) -> None:
    """One expert's feed-forward, computed from the exported tensors as the reference lays them out."""
    network = network_of(*SYSTEMS["loop"])
    tensors = load_file(exported(network, tmp_path) / "model.safetensors")
    prefix, experts = "decoder.model.layers.1.ff.experts.2.", network.decoder.layers[2].feed_forward.routed.experts
    x = torch.randn(5, 32)
    linear, gate = (x @ tensors[f"{prefix}fc1.linear.weight"].t() + tensors[f"{prefix}fc1.linear.bias"]).chunk(2, -1)
    theirs = (linear * torch.nn.functional.silu(gate)) @ tensors[f"{prefix}fc2.weight"].t()
    theirs += tensors[f"{prefix}fc2.bias"]
    ours = experts(x, torch.full((5, 1), 2), torch.ones(5, 1))
    torch.testing.assert_close(ours, theirs)
    state = dict(network.named_parameters())
    stacked = to_reference(network.config, "decoder", state)
    w1, w2 = (stacked[f"model.layers.1.ff.{name}"][2] for name in ("w1", "w2"))
    assert torch.equal(w1.t(), tensors[f"{prefix}fc1.linear.weight"])
    assert torch.equal(w2.t(), tensors[f"{prefix}fc2.weight"])


def rewritten(out: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], part: str = "") -> Path:
    """The same folder with other tensors."""
    path = out / part / "model.safetensors"
    save_file({name: value.clone() for name, value in change(load_file(path)).items()}, path)
    return out


def test_buffers_one_embedding_and_bfloat16_experts(tmp_path: Path) -> None:
    """What real files hold besides: tables of angles, a memory, the embedding once."""
    network = network_of()

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors["encoder.model.embedding.weight"]
        tensors = {
            name: value.bfloat16() if name.endswith((".w1", ".w2")) else value for name, value in tensors.items()
        }
        return tensors | {
            "decoder.model.stm.memory": torch.randn(2, 1, 6, 32),
            "memory_attention.model.stm.memory": torch.randn(2, 1, 6, 32),
            "encoder.model.layers.0.attention.rope.inv_freq": torch.ones(4),
            "decoder.model.layers.0.attention.rope.cache": torch.ones(32, 4),
        }

    found, said = imported([rewritten(exported(network, tmp_path), change)], tmp_path / "ours")
    with torch.no_grad():
        for name, value in network.named_parameters():
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                value.copy_(value.bfloat16())
    assert_equal(found, network)
    text = "\n".join(said)
    for part in ("embedding stands once, in the decoder", "2 buffers passed over", "norm_eps: null", "no tokenizer"):
        assert part in text, part
    stored = load_file(next((tmp_path / "ours").glob("*.safetensors")))
    assert stored["decoder.layers.0.feed_forward.down_proj.weight"].dtype == torch.float32
    assert stored["decoder.layers.1.feed_forward.routed.experts.down_proj"].dtype == torch.bfloat16


def test_weights_in_bfloat16_have_angles_in_bfloat16(tmp_path: Path) -> None:
    out = rewritten(exported(network_of(), tmp_path), lambda t: {name: value.bfloat16() for name, value in t.items()})
    _, said = imported([out], tmp_path / "ours")
    assert load_model(tmp_path / "ours/model.yaml").rope_angles == "bfloat16"
    assert any("rope_angles: bfloat16" in line for line in said)
    imported([out], tmp_path / "other", rope_angles="float32")
    assert load_model(tmp_path / "other/model.yaml").rope_angles == "float32"


def test_parts_of_several_folders(tmp_path: Path) -> None:
    network = network_of(*SYSTEMS["simple"])
    out = exported(network, tmp_path)
    found, _ = imported([out / "encoder", out / "decoder", out / "memory_attention", out / "mlm_head"], tmp_path / "a")
    assert_equal(found, network)
    found, _ = imported([out / "decoder"], tmp_path / "b")
    assert {name.split(".")[0] for name in found} == {"embedding", "decoder", "lm_head"}
    with pytest.raises(CheckpointError, match="no decoder among the folders"):
        imported([out / "encoder"], tmp_path / "c")
    with pytest.raises(CheckpointError, match="both hold the decoder"):
        imported([out, out / "decoder"], tmp_path / "c")


def test_our_own_export_keeps_its_model(tmp_path: Path) -> None:
    """norm_eps above all, which the other format cannot say."""
    network = network_of("norm_eps=1e-5", "name=mine")
    run = write_run(tmp_path / "run", network)
    said: Said = []
    tokenizer = byte_tokenizer(tmp_path / "tokenizer.json")
    export_run(Wanted(run, tmp_path / "theirs", "rxlm", tokenizer=tokenizer), said.append)
    assert any("norm_eps" in line for line in said)
    assert_equal(imported([tmp_path / "theirs"], tmp_path / "ours")[0], network)
    assert load_model(tmp_path / "ours/model.yaml") == network.config
    with pytest.raises(ConfigError, match="rxt-dist import"):
        load_network(tmp_path / "theirs")
    path = tmp_path / "theirs/model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"damaged: model\.safetensors"):
        imported([tmp_path / "theirs"], tmp_path / "again")


W1, GATE = "decoder.model.layers.0.ff.w1", "decoder.model.layers.0.ff.router.gate.weight"
WRONG: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "missing": (lambda t: {n: v for n, v in t.items() if n != W1.replace("w1", "w2")}, "missing: decoder.layers.1"),
    "a layer's missing": (lambda t: {n: v for n, v in t.items() if ".layers.1.norm1" not in n}, "missing: decoder.lay"),
    "unknown": (lambda t: t | {"decoder.model.layers.0.ff.w9": torch.ones(1)}, "no place for: 'model.layers.0.ff.w9'"),
    "of no part": (lambda t: t | {"adapter.weight": torch.ones(1)}, "'adapter.weight', which is no part"),
    "another shape": (lambda t: t | {W1: t[W1][:, :-1]}, "of other shapes"),
    "of too few axes": (lambda t: t | {W1: t[W1][0]}, "describes a model that cannot be"),
    "in a later layer": (
        lambda t: t | {W1.replace("layers.0", "layers.1"): t[W1][0]},
        "shapes that no model has",
    ),
    "other than the configuration": (lambda t: t | {GATE: t[GATE][:-1]}, "says num_experts=8 .* have 7"),
    "two embeddings": (
        lambda t: t | {"encoder.model.embedding.weight": t["encoder.model.embedding.weight"] + 1},
        "differ, but decoder and encoder share one",
    ),
    "experts in two forms": (
        lambda t: t | {W1.replace("w1", "experts.0.fc2.weight"): torch.ones(32, 24)},
        "one stack or 8 experts",
    ),
    "quantised": (lambda t: t | {W1: t[W1].to(torch.int8)}, "has the type I8"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.slow
def test_what_is_not_the_model(wrong: str, tmp_path: Path) -> None:
    change, message = WRONG[wrong]
    out = rewritten(exported(network_of(), tmp_path), change)
    with pytest.raises(CheckpointError, match=message):
        imported([out], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    assert not list(tmp_path.glob(".*"))


def test_one_expert_of_a_loop_is_missing(tmp_path: Path) -> None:
    out = exported(network_of(*SYSTEMS["loop"]), tmp_path)
    rewritten(out, lambda t: {name: value for name, value in t.items() if ".0.ff.experts.3." not in name})
    with pytest.raises(CheckpointError, match="one stack or 4 experts"):
        imported([out], tmp_path / "ours")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ff_activation", "relu"),
        ("use_nope", True),
        ("use_gated_cross_attention", True),
        ("att_heads", 0),
        ("att_heads", "many"),
        ("att_heads", 7),
        ("seq_len", -1),
        ("att_groups", 3),
    ],
)
@pytest.mark.slow
def test_configurations_of_another_model(key: str, value: Any, tmp_path: Path) -> None:
    out = exported(network_of(), tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["decoder_config"][key] = value
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        imported([out], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_folders_that_hold_no_weights(tmp_path: Path) -> None:
    out = exported(network_of(), tmp_path)
    cases: dict[str, tuple[Callable[[Path], Any], str]] = {
        "config": (lambda p: (p / "config.json").write_text('{"dec'), "config.json cannot be read"),
        "list": (lambda p: (p / "config.json").write_text("[]"), "holds no configuration"),
        "header": (lambda p: (p / "model.safetensors").write_bytes(b"\xff" * 64), "cannot be read as safetensors"),
        "torn": (lambda p: (p / "model.safetensors").write_bytes(b"\x10\0\0"), "cannot be read as safetensors"),
        "none": (lambda p: (p / "model.safetensors").unlink(), "but has none"),
        "pickled": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "which is pickled"),
    }
    for name, (change, message) in cases.items():
        copy = tmp_path / name
        shutil.copytree(out, copy)
        change(copy)
        with pytest.raises(CheckpointError, match=message):
            imported([copy], tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    for place, message in ((tmp_path / "nowhere", "no folder"), (tmp_path / "empty", "has no config.json")):
        with pytest.raises(CheckpointError, match=message):
            imported([place], tmp_path / "ours")
    (tmp_path / "empty/export.json").write_text('{"files": {}}')
    with pytest.raises(CheckpointError, match="an export of this program already"):
        imported([tmp_path / "empty"], tmp_path / "ours")
    (tmp_path / "empty/export.json").unlink()
    (tmp_path / "empty/config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, tmp_path / "empty/model.safetensors")
    with pytest.raises(CheckpointError, match="no part of a Reactive Transformer"):
        imported([tmp_path / "empty"], tmp_path / "ours")
    with pytest.raises(ConfigError, match="is there already"):
        imported([out], out)
    with pytest.raises(DataError, match="does not exist"):
        imported([out], tmp_path / "ours", tokenizer=tmp_path / "none.json")


def test_a_tokenizer_puts_no_space_before_a_text(tmp_path: Path) -> None:
    out = exported(network_of(), tmp_path)
    content = json.loads(byte_tokenizer(tmp_path / "theirs.json").read_text())
    step = content["pre_tokenizer"] | {"add_prefix_space": True}
    for pre_tokenizer, name in ((step, "plain"), ({"type": "Sequence", "pretokenizers": [step]}, "nested")):
        (tmp_path / "theirs.json").write_text(json.dumps(content | {"pre_tokenizer": pre_tokenizer}))
        said: Said = []
        import_published([out], tmp_path / name, tmp_path / "theirs.json", None, said.append)
        assert any("add_prefix_space" in line for line in said)
        _, text = load_network(tmp_path / name)
        assert text.decode(text.encode("hi")) == "hi"
