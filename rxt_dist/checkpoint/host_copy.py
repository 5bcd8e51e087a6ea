"""A copy of what a rank saves in host memory, so that training goes on while it is written.

It is made while the next forward and backward pass run, which change no weight and no moment: only the update that
follows them waits for what is not copied by then.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from rxt_dist.checkpoint.daemons import map_on_daemons, processors
from rxt_dist.checkpoint.large_pages import large_pages
from rxt_dist.checkpoint.writing import Share
from rxt_dist.engine.interface import Fragment

# Elements that one thread copies at once, and how many threads do: one does not use up the bandwidth of the memory, and
# more than half of the processors would make training wait.
_BLOCK_ELEMENTS = 1 << 22
_MOST_THREADS = 4


class HostCopy:
    """One buffer, as large as the float32 state of a rank, that every save uses again.

    Beside a GPU its pages are pinned, so that the copy runs at the speed of the bus and beside the kernels of training;
    torch rounds pinned memory up to a power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffer = torch.empty(0)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._copied: torch.cuda.Event | None = None
        # In the device's queue: before it waits for the copy, and when it has gone on.
        self._wait: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @torch.no_grad()
    def begin(self, share: Share, constant: int) -> Share:
        """Begin to copy a share. Returns the copy, whose values are there after `complete`; valid until the next call.

        The share may not change before `before_change` was called.

        Args:
            constant: how many of its last fragments training does not change; these are not copied.
        """
        if self._thread is not None:  # Of a save that failed before it asked for its copy.
            self._thread.join()
        self._wait = None
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
        self._begin_copy(pairs)
        routing = {name: tensor.to("cpu", copy=True) for name, tensor in share.routing.items()}
        return Share(share.rank, (*copied, *share.fragments[len(changing) :]), routing)

    def before_change(self) -> None:
        """What is being copied may change from here on: the host waits for the copy, or the device does, in what is
        queued there from now on."""
        if self._copied is not None:
            stream = torch.cuda.current_stream(self._device)
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            stream.record_event(before)
            stream.wait_event(self._copied)
            stream.record_event(after)
            self._wait = before, after
        if self._thread is not None:
            self._thread.join()

    def device_wait(self) -> float:
        """Seconds for which the device waited for the last copy; 0 where the host did."""
        if self._wait is None:
            return 0.0
        before, after = self._wait
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def complete(self) -> None:
        """Wait until the copy is there, from any thread.

        Raises:
            BaseException: what went wrong with it.
        """
        if self._copied is not None:
            self._copied.synchronize()
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Give the memory back; a copy is complete."""
        self._buffer = torch.empty(0)

    def _begin_copy(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Copy the second of each pair into the first."""
        device = [pair for pair in pairs if pair[1].device.type != "cpu"]
        if device:
            assert self._stream is not None, "tensors of a device that this copy is not for"
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                for target, source in device:
                    target.copy_(source, non_blocking=True)
            self._copied = self._stream.record_event()
        blocks = [
            (target.numpy(), source.numpy())
            for pair in pairs
            if pair[1].device.type == "cpu"
            for target, source in zip(*(tensor.split(_BLOCK_ELEMENTS) for tensor in pair), strict=True)
        ]
        self._thread = self._error = None
        if blocks:
            # It must not keep a process alive that a person or a scheduler wants to end.
            self._thread = threading.Thread(target=self._copy, args=(blocks,), name="host-copy", daemon=True)
            self._thread.start()

    def _copy(self, blocks: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Copy the second of each pair into the first, beside training."""
        try:
            # numpy, since torch would begin as many threads in each of ours as the machine has processors.
            map_on_daemons(lambda block: np.copyto(*block), blocks, max(1, min(_MOST_THREADS, processors() // 2)))
        except BaseException as error:
            self._error = error

    def _fit(self, elements: int) -> None:
        if self._buffer.numel() == elements:
            return
        self.close()
        if self._device.type == "cuda":
            # The system may pin no more memory: then the copy is slower, and as right.
            with suppress(RuntimeError):
                self._buffer = torch.empty(elements, pin_memory=True)
                return
        self._buffer = torch.from_numpy(large_pages(4 * elements).view(np.float32))
