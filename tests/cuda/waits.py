"""Finds where the host would wait for the device.

On a GPU torch itself says so (`torch.cuda.set_sync_debug_mode`). On the CPU nothing ever waits; a dispatch mode stands
in, which refuses the operators that would: those whose value or shape the host needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from rxt_dist.model import attention
from rxt_dist.model.attention import Documents
from rxt_dist.model.experts import Dispatch, ExpertStack

WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::bincount",
    "aten::_unique2",
    "aten::equal",
    "aten::is_nonzero",
)


class _Refuse(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        by_mask = name.startswith("aten::index") and any(
            isinstance(one, Tensor) and one.dtype == torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for one in arg
        )
        unsized = name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITING or by_mask or unsized:
            raise RuntimeError(f"the host would wait for the device in {function.name()}")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """An operation for which the host waits is an error while the block lasts."""
    if device.type == "cpu":
        with _Refuse():
            yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def count_waits(action: Any) -> list[str]:
    """The waits of an action on a GPU: the line of Python that led to each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{one.filename}:{one.lineno}" for one in caught if "called a synchronizing" in str(one.message)]


def take_paths_of_cuda(monkeypatch: Any) -> None:
    """On the CPU, let a model take the code that CUDA takes in bfloat16; only the flash kernel itself is replaced."""
    from torch.nn.attention import varlen

    dense = attention.attend

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, documents: Documents | None = None) -> Tensor:
        if documents is None:
            return dense(q, k, v, causal=causal)
        return attention._varlen(q, k, v, documents, causal)

    def experts(self: ExpertStack, x_ND: Tensor, selected_NK: Tensor, weights_NK: Tensor) -> Tensor:
        return self._grouped(x_ND, weights_NK, selected_NK, Dispatch.of(selected_NK, self.num_experts))

    def attend_as_cuda(*heads: Tensor, keys_BS: Tensor | None = None, **how: Any) -> Tensor:
        assert keys_BS is None
        return attend(*heads, **how)

    monkeypatch.setattr(attention, "attend", attend_as_cuda)
    monkeypatch.setattr(ExpertStack, "forward", experts)
    monkeypatch.setattr(varlen, "varlen_attn", _by_document)


def _by_document(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Any, window_size: tuple[int, int]) -> Tensor:
    with _disable_current_modes():  # The kernel reads the bounds on the device.
        lengths = cu_seqlens.diff().tolist()
    pieces = [x.unsqueeze(0).split(lengths, dim=1) for x in (q, k, v)]
    causal = window_size == (-1, 0)
    parts = [attention._dense(*one, causal=causal, mask=None) for one in zip(*pieces, strict=True)]
    return torch.cat(parts, dim=1).squeeze(0)
