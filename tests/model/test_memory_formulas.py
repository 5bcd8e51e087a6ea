"""Memory attention against plain formulas: groups of consecutive layers, an inner attention of its own shape."""

from __future__ import annotations

import plain_formulas as plain
import pytest
import torch
from tiny import model_config, relative

from rxt_dist.model.memory import initial_memory
from rxt_dist.model.reactive import ReactiveTransformer

LAYERS, ROWS, TOKENS = 6, 2, 9
VARIANTS = {
    "simple": "simple",
    "self": "self",
    "interlayer": "interlayer",
    "self-interlayer": "self-interlayer",
    "grouped": "grouped, groups: 2",
    "grouped by two": "grouped, groups: 3",
}
SHAPES = {"as the main one": "null", "of its own": "{query_heads: 1, kv_heads: 1}"}


@pytest.mark.parametrize("inner", SHAPES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_writing_twice_is_what_the_formulas_give(variant: str, inner: str) -> None:
    parts = (
        f"variant: {VARIANTS[variant]}, inner_attention: {SHAPES[inner]}, attention: {{query_heads: 4, kv_heads: 2}}"
    )
    config = model_config(f"layers={LAYERS}", "norm_eps=0.05", "rope_base=20", f"memory_attention={{{parts}}}")
    network = ReactiveTransformer(config).memory_attention
    assert network is not None
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(1 + torch.randn(parameter.shape, generator=generator) * 0.3)
    parameters = {f"memory_attention.{name}": p.detach().double() for name, p in network.named_parameters()}
    memory_LBSD = initial_memory(config, ROWS, generator)
    data_LBTD = torch.randn(2, LAYERS, ROWS, TOKENS, config.dim, generator=generator)
    positions_BT = torch.arange(TOKENS).expand(ROWS, -1)
    wanted = [[layer.double() for layer in memory_LBSD[:, row]] for row in range(ROWS)]
    for interaction in data_LBTD:
        memory_LBSD, _ = network(memory_LBSD, interaction, positions_BT)
        wanted = [
            plain.memory_write(parameters, config, wanted[row], [layer.double() for layer in interaction[:, row]])
            for row in range(ROWS)
        ]
        for row in range(ROWS):
            assert relative(memory_LBSD[:, row], torch.stack(wanted[row])) < 1e-5
