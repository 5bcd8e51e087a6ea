"""`attend` on the device against the float32 CPU: variable-length flash attention in bfloat16, masks in float32."""

from __future__ import annotations

import pytest
import torch
from measures import assert_near, tolerance
from torch import Tensor

from rxt_dist.model.attention import Documents, attend

ROWS, TOKENS, HEADS, SIZE = 2, 320, 8, 32
# Of a row: uneven, one token each at both ends, a padding tail (a document of its own), one document alone.
LENGTHS = {
    "uneven": ((100, 7, 213), (64, 128, 128)),
    "one token": ((1, 1, 317, 1), (1, 318, 1)),
    "all of one token": ((1,) * TOKENS, (1,) * TOKENS),
    "a tail": ((5, 315), (319, 1)),
    "a whole row": ((TOKENS,), (300, 20)),
}


def documents(kind: str, device: torch.device) -> Documents:
    lengths = tuple(length for row in LENGTHS[kind] for length in row)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(ends.to(device), lengths)


def heads(key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, as float32 values that `dtype` holds exactly."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, TOKENS, count, SIZE) for count in (HEADS, key_heads, key_heads, HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype).float() for shape in shapes]


def run(inputs: list[Tensor], device: torch.device, dtype: torch.dtype, **how: object) -> list[Tensor]:
    """The output and the gradients of q, k and v."""
    *leaves, direction = (x.to(device, dtype) for x in inputs)
    leaves = [x.requires_grad_() for x in leaves]
    output = attend(*leaves, **how)  # type: ignore[arg-type]
    assert output.dtype == dtype
    return [output, *torch.autograd.grad(output, leaves, direction)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("key_heads", [4, 8])
@pytest.mark.parametrize("kind", LENGTHS)
def test_packed_documents(kind: str, key_heads: int, causal: bool, dtype: torch.dtype, device: torch.device) -> None:
    inputs = heads(key_heads, dtype)
    expected = run(inputs, torch.device("cpu"), torch.float32, causal=causal, documents=documents(kind, "cpu"))
    actual = run(inputs, device, dtype, causal=causal, documents=documents(kind, device))
    # With documents of one token the gradients of q and k are zero.
    assert_near(("output", "q", "k", "v"), actual, expected, tolerance(dtype), zero_below=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_hidden_keys_and_one_memory_for_all_rows(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v, direction = heads(4, dtype)
    seen_BS = torch.arange(TOKENS) < torch.tensor([[TOKENS], [5]])
    one = [q, k[:1], v[:1], direction]
    for inputs, keys_BS in (([q, k, v, direction], seen_BS), (one, None)):
        expected = run(inputs, torch.device("cpu"), torch.float32, keys_BS=keys_BS)
        actual = run(inputs, device, dtype, keys_BS=None if keys_BS is None else keys_BS.to(device))
        assert_near(("output", "q", "k", "v"), actual, expected, tolerance(dtype))
