"""A copy of what a rank saves in host memory, so that training goes on while it is written."""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from rxt_dist.checkpoint.daemons import map_on_daemons, processors
from rxt_dist.checkpoint.writing import Share
from rxt_dist.engine.interface import Fragment

# Elements that one thread copies at once, and how many threads do: one does not use up the bandwidth of the memory.
_BLOCK_ELEMENTS = 1 << 22
_MOST_THREADS = 4


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
        copied, pairs, at = [], [], 0
        for fragment in changing:
            tensors: dict[str, Tensor] = {}
            for kind, tensor in fragment.tensors.items():
                tensors[kind] = self._buffer[at : at + tensor.numel()]
                pairs.append((tensors[kind], tensor.detach()))
                at += tensor.numel()
            copied.append(Fragment(fragment.name, fragment.start, tensors))
        self._copy(pairs)
        routing = {name: tensor.to("cpu", copy=True) for name, tensor in share.routing.items()}
        return Share(share.rank, (*copied, *share.fragments[len(changing) :]), routing)

    def close(self) -> None:
        """Give the memory back."""
        self._buffer = torch.empty(0)

    def _copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy the second of each pair into the first."""
        device = [pair for pair in pairs if pair[1].device.type != "cpu"]
        for target, source in device:
            target.copy_(source, non_blocking=True)
        blocks = [
            (target.numpy(), source.numpy())
            for pair in pairs
            if pair[1].device.type == "cpu"
            for target, source in zip(*(tensor.split(_BLOCK_ELEMENTS) for tensor in pair), strict=True)
        ]
        # numpy, since torch would begin as many threads in each of ours as the machine has processors.
        map_on_daemons(lambda block: np.copyto(*block), blocks, min(_MOST_THREADS, processors()))
        if device:
            torch.cuda.current_stream(self._device).synchronize()

    def _fit(self, elements: int) -> None:
        if self._buffer.numel() == elements:
            return
        self.close()
        if self._device.type == "cuda":
            # The system may pin no more memory: then the copy is slower, and as right.
            with suppress(RuntimeError):
                self._buffer = torch.empty(elements, pin_memory=True)
                return
        self._buffer = _new_memory(elements)


def _new_memory(elements: int) -> Tensor:
    """float32 [elements] without values, in large pages where the system has some: at the first copy each page is
    brought in when it is touched, and small ones take longer than what is copied into them."""
    if not elements:
        return torch.empty(0)
    memory = mmap.mmap(-1, 4 * elements, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):  # A matter of Linux, and of how it is set up.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32)
