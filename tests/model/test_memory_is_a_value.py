"""The short-term memory is passed in and handed back: no module keeps it, nothing changes it in place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import model_config
from torch import Tensor

from rxt_dist.config.load import load_model
from rxt_dist.model.init import initialise
from rxt_dist.model.memory import initial_memory
from rxt_dist.model.reactive import ReactiveTransformer

CONFIGS = sorted((Path(__file__).parents[2] / "configs/model").glob("*.yaml"))
ROWS, TOKENS = 3, 10
POSITIONS = torch.arange(TOKENS).expand(ROWS, -1)
VARIANTS = ["simple", "self", "interlayer", "self-interlayer", "grouped"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_module_has_buffers(path: Path) -> None:
    """A buffer would be broadcast from rank 0 by data-parallel wrappers (fault F4) and saved in checkpoints."""
    with torch.device("meta"):
        model = ReactiveTransformer(load_model(path))
    assert [name for name, _ in model.named_buffers()] == []


def model_of(*overrides: str) -> ReactiveTransformer:
    model = ReactiveTransformer(model_config(*overrides))
    initialise(model, 0)
    return model


def inputs(model: ReactiveTransformer) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    memory = initial_memory(model.config, ROWS, generator)
    return memory, torch.randn(2, ROWS, TOKENS, 32, generator=generator)


def state_of(model: ReactiveTransformer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_writing_returns_a_new_memory_and_leaves_the_old_one(variant: str) -> None:
    groups = 2 if variant == "grouped" else 1
    model = model_of(f"memory_attention.variant={variant}", f"memory_attention.groups={groups}")
    assert model.memory_attention is not None
    memory, data = inputs(model)
    before, weights = [memory.clone(), data.clone()], state_of(model)
    first, _ = model.memory_attention(memory, data, POSITIONS)
    second, _ = model.memory_attention(memory, data, POSITIONS)
    assert first.shape == memory.shape
    assert first.data_ptr() != memory.data_ptr()
    assert torch.equal(first, second), "a second write of the same interaction sees the first one"
    assert not torch.isclose(first, memory).all(-1).any(), "every slot of every layer is written"
    assert torch.equal(memory, before[0])
    assert torch.equal(data, before[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_each_row_has_its_own_memory() -> None:
    model = model_of()
    assert model.memory_attention is not None
    memory, data = inputs(model)
    whole, gates_LB = model.memory_attention(memory, data, POSITIONS)
    for row in range(ROWS):
        part = slice(row, row + 1)
        alone, gates_L1 = model.memory_attention(memory[:, part], data[:, part], POSITIONS[part])
        torch.testing.assert_close(alone, whole[:, part])
        torch.testing.assert_close(gates_L1, gates_LB[:, part])


@pytest.mark.parametrize("kind", ["static", "elementwise", "linear", "none"])
@pytest.mark.parametrize("per_slot", [True, False])
def test_gates_are_told_as_their_mean_over_slots(kind: str, per_slot: bool) -> None:
    """Those of the write, by which what is read is weighed, not those of the exchange between slots."""
    config = f"memory_attention.gate={{kind: {kind}, per_slot: {str(per_slot).lower()}}}"
    model = model_of(config, "memory_attention.variant=interlayer", "memory_attention.groups=1")
    assert model.memory_attention is not None
    memory, data = inputs(model)
    seen: list[Tensor] = []
    for layer in model.memory_attention.layers:
        layer.write_gate.register_forward_hook(lambda _, __, output: seen.append(output[1]))  # type: ignore[union-attr]
    gates_LB = model.memory_attention(memory, data, POSITIONS).gates_LB
    slots = memory.shape[2]
    expected = torch.stack([gate.detach().expand(ROWS, slots, 1).mean((1, 2)) for gate in seen])
    assert torch.equal(gates_LB, expected)
    assert bool((gates_LB == 0).all()) == (kind == "none")


def test_padding_is_not_written() -> None:
    model = model_of()
    assert model.memory_attention is not None
    memory, data = inputs(model)
    keys = torch.arange(TOKENS).expand(ROWS, -1) < 6
    masked, _ = model.memory_attention(memory, data, POSITIONS, keys)
    other = data.clone()
    other[:, :, 6:] = 99.0
    torch.testing.assert_close(model.memory_attention(memory, other, POSITIONS, keys)[0], masked)
    torch.testing.assert_close(model.memory_attention(memory, data[:, :, :6], POSITIONS[:, :6])[0], masked)


def test_gradients_reach_the_memory_that_was_read_and_the_one_before_it() -> None:
    """Two writes in a row: the whole dialogue can be trained through."""
    model = model_of()
    assert model.memory_attention is not None
    memory, data = inputs(model)
    memory.requires_grad_()
    first, _ = model.memory_attention(memory, data, POSITIONS)
    second, gates_LB = model.memory_attention(first, data, POSITIONS)
    second.square().sum().backward()
    assert not gates_LB.requires_grad
    assert memory.grad is not None
    assert bool((memory.grad.abs().sum(-1) > 0).all())


def test_the_decoder_reads_the_memory_and_changes_nothing() -> None:
    model = model_of()
    memory, _ = inputs(model)
    embedded = torch.randn(ROWS, TOKENS, 32)
    before, weights = [memory.clone(), embedded.clone()], state_of(model)
    first = model.decoder(embedded, POSITIONS, memory).hidden_BTD
    assert torch.equal(model.decoder(embedded, POSITIONS, memory).hidden_BTD, first)
    assert torch.equal(memory, before[0])
    assert torch.equal(embedded, before[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    other = memory.clone()
    other[1, 0, 2] += 1.0
    changed = model.decoder(embedded, POSITIONS, other).hidden_BTD
    assert not torch.allclose(changed[0], first[0])
    assert torch.equal(changed[1:], first[1:])


def test_one_memory_serves_all_rows() -> None:
    model = model_of()
    memory, _ = inputs(model)
    embedded = torch.randn(ROWS, TOKENS, 32)
    shared = model.decoder(embedded, POSITIONS, memory[:, :1]).hidden_BTD
    spread = model.decoder(embedded, POSITIONS, memory[:, :1].expand(-1, ROWS, -1, -1)).hidden_BTD
    torch.testing.assert_close(shared, spread)


def test_a_fresh_memory_is_normal_and_repeatable() -> None:
    config = model_config("stm_slots=500")
    memory = initial_memory(config, 2, torch.Generator().manual_seed(1))
    assert memory.shape == (2, 2, 500, 32)
    assert memory.mean().item() == pytest.approx(0.0, abs=0.02)
    assert memory.std().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(initial_memory(config, 2, torch.Generator().manual_seed(1)), memory)
