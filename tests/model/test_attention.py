"""Every path through `attend` against softmax(q k^T / sqrt d) v written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen

from rxt_dist.model import attention
from rxt_dist.model.attention import Documents, attend

ROWS, TOKENS, HEADS, KEY_HEADS, SIZE = 2, 24, 4, 2, 6
LENGTHS = (9, 15, 1, 20, 3)


def heads(*, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Random q [B, T, H, d], k and v [B, T, G, d]."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, TOKENS, HEADS, SIZE), (rows, TOKENS, KEY_HEADS, SIZE), (rows, TOKENS, KEY_HEADS, SIZE))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def written_out(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """`seen` is bool [B, T, S]."""
    k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(SIZE)
    scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
    return torch.einsum("bhts,bshd->bthd", scores.softmax(-1), v)


def packed(lengths: tuple[int, ...] = LENGTHS) -> Documents:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Documents(ends, lengths)


def seen_by(lengths: tuple[int, ...], *, causal: bool) -> Tensor:
    """bool [B, T, T] by comparing document numbers."""
    ids_BT = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).view(ROWS, TOKENS)
    seen = ids_BT.unsqueeze(2) == ids_BT.unsqueeze(1)
    return seen & torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril() if causal else seen


def assert_same(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-10) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    direction = torch.randn_like(expected)
    mine, theirs = (torch.autograd.grad(output, inputs, direction) for output in (actual, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pairs_per_call", [0, 10**9], ids=["a call per document", "one dense mask"])
def test_packed_documents_do_not_see_each_other(
    causal: bool, pairs_per_call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PAIRS_PER_CALL", pairs_per_call)
    inputs = heads()
    actual = attend(*inputs, causal=causal, documents=packed())
    assert_same(actual, written_out(*inputs, seen_by(LENGTHS, causal=causal)), inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_documents_that_fill_their_rows_need_no_mask(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Documents, "_mask", None)
    inputs, lengths = heads(), (TOKENS, TOKENS)
    actual = attend(*inputs, causal=causal, documents=packed(lengths))
    assert_same(actual, written_out(*inputs, seen_by(lengths, causal=causal)), inputs)


def test_rows_of_equal_length_documents_that_are_not_rows_keep_their_mask() -> None:
    inputs, lengths = heads(), (TOKENS // 2,) * 4
    actual = attend(*inputs, documents=packed(lengths))
    assert_same(actual, written_out(*inputs, seen_by(lengths, causal=False)), inputs)


def test_hidden_keys_are_not_seen() -> None:
    inputs = heads()
    keys_BS = torch.arange(TOKENS) < torch.tensor([[TOKENS], [5]])
    expected = written_out(*inputs, keys_BS.unsqueeze(1).expand(-1, TOKENS, -1))
    assert_same(attend(*inputs, keys_BS=keys_BS), expected, inputs)


def test_one_memory_serves_all_rows() -> None:
    q, _, _ = heads()
    _, k, v = heads(rows=1)
    seen = torch.ones(ROWS, TOKENS, TOKENS, dtype=torch.bool)
    expected = written_out(q, k.expand(ROWS, -1, -1, -1), v.expand(ROWS, -1, -1, -1), seen)
    assert_same(attend(q, k, v), expected, (q, k, v))


@pytest.mark.parametrize("documents", [None, packed()])
def test_short_bfloat16_rows_are_attended_in_float32(documents: Documents | None) -> None:
    half = heads(dtype=torch.bfloat16)
    exact = tuple(x.detach().double() for x in half)
    seen = torch.ones(ROWS, TOKENS, TOKENS, dtype=torch.bool) if documents is None else seen_by(LENGTHS, causal=False)
    actual = attend(*half, documents=documents)
    assert actual.dtype == torch.bfloat16
    # Nothing but the rounding of the result.
    torch.testing.assert_close(actual, written_out(*exact, seen).to(torch.bfloat16), rtol=2**-7, atol=1e-6)


def flash_by_its_documentation(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *, window_size: tuple[int, int]
) -> Tensor:
    """What torch documents of varlen_attn: a query sees `left` keys before it and `right` after it, -1 being all."""
    assert torch.equal(cu_q, cu_k)
    assert q.shape[1:] == k.shape[1:] == v.shape[1:]
    assert max_q == max_k == int(cu_q.diff().max())
    left, right = (TOKENS if side < 0 else side for side in window_size)
    outputs = []
    for start, stop in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        away = torch.arange(stop - start).unsqueeze(0) - torch.arange(stop - start).unsqueeze(1)
        seen = (away >= -left) & (away <= right)
        scores = torch.einsum("thd,shd->hts", q[start:stop], k[start:stop]) / math.sqrt(SIZE)
        scores = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", scores, v[start:stop]))
    return torch.cat(outputs)


def flash_with_grouped_heads(
    q: Tensor, k: Tensor, v: Tensor, *others: Any, enable_gqa: bool = False, **named: Any
) -> Tensor:
    """Of later versions of torch: fewer key heads than query heads, where that is asked for."""
    if enable_gqa:
        assert k.shape[1] == v.shape[1] == KEY_HEADS, "key heads are repeated though the kernel can group them"
        k, v = (x.repeat_interleave(HEADS // KEY_HEADS, dim=1) for x in (k, v))
    return flash_by_its_documentation(q, k, v, *others, **named)


@pytest.mark.parametrize("kernel", [flash_by_its_documentation, flash_with_grouped_heads])
@pytest.mark.parametrize("causal", [False, True])
def test_the_variable_length_path_of_cuda_sees_what_it_should(
    causal: bool, kernel: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel itself runs on CUDA only; what it is asked for is tried with a stand-in that follows its page."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    inputs = heads()
    actual = attention._varlen(*inputs, packed(), causal)
    assert_same(actual, written_out(*inputs, seen_by(LENGTHS, causal=causal)), inputs)


def test_a_mask_is_made_once_for_all_layers() -> None:
    documents = packed()
    assert documents.mask(ROWS, causal=True) is documents.mask(ROWS, causal=True)
    assert not torch.equal(documents.mask(ROWS, causal=True), documents.mask(ROWS, causal=False))
