"""The parts put together, in every mode that a configuration offers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import make_stage, model_config, packed_batch, relative, run_config

from rxt_dist.config.load import load_model
from rxt_dist.model.attention import Documents
from rxt_dist.model.count import count_parameters, count_system
from rxt_dist.model.memory import initial_memory
from rxt_dist.model.reactive import ReactiveTransformer

CONFIGS = sorted((Path(__file__).parents[2] / "configs/model").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_part_has_the_parameters_that_are_counted(path: Path) -> None:
    config = load_model(path)
    with torch.device("meta"):
        model = ReactiveTransformer(config)

    def size(*modules: torch.nn.Module | None) -> int:
        return sum(parameter.numel() for module in modules if module for parameter in module.parameters())

    counted = {name: count.total for name, count in count_parameters(config).items()}
    assert size(model.embedding, model.decoder, model.lm_head) == counted["decoder"]
    assert (size(model.embedding, model.encoder) if model.encoder else 0) == counted["encoder"]
    assert size(model.mlm_head) == counted["mlm_head"]
    assert size(model.memory_attention) == counted["memory_attention"]
    assert size(model) - size(model.mlm_head) == count_system(config).total


@pytest.mark.parametrize("gated", ["true", "false"])
@pytest.mark.parametrize("shared", ["global", "local", "none", "one", "absent"])
@pytest.mark.parametrize("bias", ["global", "local", "none"])
@pytest.mark.slow
def test_every_mode_runs_and_trains_all_it_has(bias: str, shared: str, gated: str) -> None:
    overrides = [
        f"decoder.moe.bias={bias}",
        f"decoder.self_attention.gated={gated}",
        f"encoder.attention.gated={gated}",
        f"decoder.attention_bias={gated}",
    ]
    counts = {"one": ("1", "24"), "absent": ("0", "0")}.get(shared, ("2", "24"))
    overrides += [f"decoder.moe.shared_experts={counts[0]}", f"decoder.moe.shared_hidden={counts[1]}"]
    if shared in ("global", "local", "none"):
        overrides.append(f"decoder.moe.shared_bias={shared}")
    stage = make_stage(run_config(model=model_config(*overrides)))
    sums = stage(stage.prepare(packed_batch(), 0), torch.full((3, 8), 1 / 8)).sums_J
    sums.sum().backward()
    assert bool(torch.isfinite(sums).all())
    for name, parameter in stage.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(parameter.grad.any()), f"{name} has no part in the loss"


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_head_norms(norm: str) -> None:
    model = make_stage(run_config(model=model_config(f"decoder.head_norm={norm}"))).model
    memory = initial_memory(model.config, 1, torch.Generator().manual_seed(0))
    out = model.decoder(torch.randn(2, 6, 32), torch.arange(6).expand(2, -1), memory).hidden_BTD
    rms = out.square().mean(-1).sqrt()
    assert torch.allclose(rms, torch.ones(2, 6), atol=1e-3) is (norm != "none")


def test_the_decoder_is_causal_and_the_encoder_is_not() -> None:
    model = make_stage(run_config()).model
    assert model.encoder is not None
    positions = torch.arange(12).unsqueeze(0)
    memory = initial_memory(model.config, 1, torch.Generator().manual_seed(0))
    x = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(1))
    other = x.clone()
    other[0, 7] += 1.0
    decoded = [model.decoder(each, positions, memory).hidden_BTD for each in (x, other)]
    assert relative(decoded[1][:, :7], decoded[0][:, :7]) < 1e-6
    assert bool((decoded[1][:, 7:] != decoded[0][:, 7:]).any(-1).all())
    encoded = [model.encoder(each, positions) for each in (x, other)]
    assert bool((encoded[1][-1] != encoded[0][-1]).any(-1).all())


def test_the_encoder_returns_the_stream_after_every_layer() -> None:
    model = make_stage(run_config()).model
    assert model.encoder is not None
    x, positions = torch.randn(2, 8, 32), torch.arange(8).expand(2, -1)
    encoded = model.encoder(x, positions)
    assert encoded.shape == (2, 2, 8, 32)
    deeper = model.encoder.layers[1]
    model.encoder.layers = model.encoder.layers[:1]
    torch.testing.assert_close(model.encoder(x, positions)[0], encoded[0])
    model.encoder.layers.append(deeper)


def test_each_stateful_layer_reads_its_own_memory_layer() -> None:
    model = make_stage(run_config()).model
    positions, x = torch.arange(5).unsqueeze(0), torch.randn(1, 5, 32)
    memory = initial_memory(model.config, 1, torch.Generator().manual_seed(0))
    read = []
    for index in (1, 2):
        layer = model.decoder.layers[index]
        layer.memory_norm.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    model.decoder(x, positions, memory)
    assert [torch.equal(part, memory[index]) for index, part in enumerate(read)] == [True, True]
    assert [layer.stateful for layer in model.decoder.layers] == [False, True, True, False]
    assert [layer.is_moe for layer in model.decoder.layers] == [False, True, True, True]


def test_padding_masks_and_documents_say_the_same() -> None:
    """A row with a padding tail: as a document of its own, and as keys that nobody sees."""
    model = make_stage(run_config()).model
    assert model.encoder is not None
    x, positions = torch.randn(1, 10, 32), torch.arange(10).unsqueeze(0)
    documents = Documents(torch.tensor([0, 7, 10], dtype=torch.int32), (7, 3))
    packed = model.encoder(x, positions, documents)
    masked = model.encoder(x, positions, keys_BT=positions < 7)
    torch.testing.assert_close(packed[:, :, :7], masked[:, :, :7])
