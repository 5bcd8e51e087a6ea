"""A copy of what a rank saves in host memory, so that training goes on while it is written."""

from __future__ import annotations

import torch
from torch import Tensor

from rxt_dist.checkpoint.writing import Share
from rxt_dist.engine.interface import Fragment


class HostCopy:
    """One buffer, as large as the float32 state of a rank, that every save uses again.

    Beside a GPU its pages are pinned, so that the copy runs at the speed of the bus; torch rounds pinned memory up to a
    power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0)

    @torch.no_grad()
    def take(self, share: Share, constant: int) -> Share:
        """Copy a share; the copy is valid until the next call.

        Args:
            constant: how many of its last fragments training does not change; these are not copied.
        """
        changing = share.fragments[: len(share.fragments) - constant]
        self._fit(sum(tensor.numel() for fragment in changing for tensor in fragment.tensors.values()))
        copied, at = [], 0
        for fragment in changing:
            tensors: dict[str, Tensor] = {}
            for kind, tensor in fragment.tensors.items():
                tensors[kind] = self._buffer[at : at + tensor.numel()]
                tensors[kind].copy_(tensor, non_blocking=True)
                at += tensor.numel()
            copied.append(Fragment(fragment.name, fragment.start, tensors))
        routing = {name: tensor.to("cpu", copy=True) for name, tensor in share.routing.items()}
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return Share(share.rank, (*copied, *share.fragments[len(changing) :]), routing)

    def close(self) -> None:
        """Give the memory back."""
        self._buffer = torch.empty(0)

    def _fit(self, elements: int) -> None:
        if self._buffer.numel() == elements:
            return
        self.close()
        try:
            self._buffer = torch.empty(elements, pin_memory=self._device.type == "cuda")
        except RuntimeError:  # The system pins no more memory: the copy is slower, and as right.
            self._buffer = torch.empty(elements)
