"""From positions to a `Batch`, with one thread that reads ahead.

Reading a batch costs tens of microseconds, so worker processes would only add copies; one thread hides the rest. What
is read stays as small as it is on disk: 16-bit ids and the bounds of documents. Widening, labels and positions are
computed where the batch is used.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.masking import IGNORED_LABEL

Int64Array = npt.NDArray[np.int64]


class Order(Protocol):
    """Anything that says which row stands at a position: `GlobalOrder` for training, `FileOrder` for evaluation."""

    def rows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Source index and row of each position, int64 [R] each."""
        ...


@dataclass(frozen=True)
class FileOrder:
    """The rows of one source as they stand in its files: position = row."""

    source: int

    def rows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        return np.full_like(positions, self.source), positions


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, with everything that attention and the losses need to keep documents apart.

    tokens_BT: int64 ids, PAD (0) after the last document of a row.
    labels_BT: int64 next token within the document; -100 on padding and on each segment's last token.
    positions_BT: int64 position within the document piece, from 0 (the padding tail counts from 0 as well).
    segments_BT: int32 number of the document within its row, from 0; -1 on padding.
    cu_seqlens: int32 [N + 1] bounds of all segments in the flattened B * T tokens, from 0 to B * T; the padding tail
        of a row is a segment of its own, so no segment spans two rows.
    source_B: int64 index of each row's source in the dataset's sources.
    samples_B: int64 global position of each row; the key of all randomness that concerns it.
    """

    tokens_BT: torch.Tensor
    labels_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    cu_seqlens: torch.Tensor
    source_B: torch.Tensor
    samples_B: torch.Tensor

    @property
    def rows(self) -> int:
        return int(self.tokens_BT.shape[0])

    @property
    def tokens(self) -> int:
        """All positions, padding included: B * T."""
        return self.tokens_BT.numel()

    def micro_batches(self, rows: int) -> list[Batch]:
        """Split into consecutive batches of `rows` rows.

        Raises:
            ValueError: B is not a multiple of `rows`.
        """
        if rows < 1 or self.rows % rows:
            raise ValueError(f"a batch of {self.rows} rows cannot be split into micro-batches of {rows}")
        width = self.tokens_BT.shape[1]
        result = []
        for start in range(0, self.rows, rows):
            first, last = start * width, (start + rows) * width
            # Every row ends a segment, so both bounds are entries of cu_seqlens.
            inside = (self.cu_seqlens >= first) & (self.cu_seqlens <= last)
            bounds = self.cu_seqlens[inside] - first
            part = slice(start, start + rows)
            result.append(
                Batch(
                    tokens_BT=self.tokens_BT[part],
                    labels_BT=self.labels_BT[part],
                    positions_BT=self.positions_BT[part],
                    segments_BT=self.segments_BT[part],
                    cu_seqlens=bounds,
                    source_B=self.source_B[part],
                    samples_B=self.samples_B[part],
                )
            )
        return result


@dataclass(frozen=True)
class HostBatch:
    """A batch as it was read, in host memory; `to` makes a `Batch` of it.

    tokens_BT: int16 [B, T], the bits of the stored uint16 ids (torch knows few operations on uint16).
    cu_seqlens, source_B, samples_B: as in `Batch`.
    numbers_N: int32 number of each segment within its row, from 0; -1 for a padding tail.
    """

    tokens_BT: torch.Tensor
    cu_seqlens: torch.Tensor
    numbers_N: torch.Tensor
    source_B: torch.Tensor
    samples_B: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """The whole batch on a device, where all but the ids and the bounds is computed.

        The copy does not wait where the host memory is pinned.
        """
        narrow_BT, cu_seqlens, numbers_N, source_B, samples_B = (
            value.to(device, non_blocking=True)
            for value in (self.tokens_BT, self.cu_seqlens, self.numbers_N, self.source_B, self.samples_B)
        )
        shape, total = narrow_BT.shape, narrow_BT.numel()
        tokens = narrow_BT.flatten().to(torch.int64).bitwise_and_(0xFFFF)
        lengths_N = cu_seqlens.diff()
        # With the size stated, a device need not tell the host how long the result became.
        starts = torch.repeat_interleave(cu_seqlens[:-1], lengths_N, output_size=total)
        segments = torch.repeat_interleave(numbers_N, lengths_N, output_size=total)
        labels = tokens.roll(-1).masked_fill_(segments < 0, IGNORED_LABEL)
        labels[cu_seqlens[1:] - 1] = IGNORED_LABEL
        return Batch(
            tokens_BT=tokens.view(shape),
            labels_BT=labels.view(shape),
            positions_BT=torch.arange(total, device=device).sub_(starts).view(shape),
            segments_BT=segments.view(shape),
            cu_seqlens=cu_seqlens,
            source_B=source_B,
            samples_B=samples_B,
        )


def host_batch(
    tokens_BT: torch.Tensor,
    seg_count_B: Int64Array,
    seg_len_I: Int64Array,
    source_B: Int64Array,
    samples_B: Int64Array,
) -> HostBatch:
    """Bounds of all segments from the stored lengths (without looking for EOS), each row's padding after its documents.

    Args:
        tokens_BT: int16 [B, T], as in `HostBatch`.
        seg_count_B, seg_len_I: segments in each row, and the lengths of all in row order.
    """
    rows, width = tokens_BT.shape
    last_B = seg_count_B.cumsum()
    first_B = last_B - seg_count_B
    ends = np.concatenate(([0], seg_len_I.cumsum()))
    used_B = ends[last_B] - ends[first_B]
    row_ends_B = np.arange(1, rows + 1) * width
    is_padded_B = used_B < width
    # Segment s of row b stands after s segments and the tails of the padded rows before b.
    tails_before_B = is_padded_B.cumsum() - is_padded_B
    at_I = np.arange(len(seg_len_I)) + tails_before_B.repeat(seg_count_B)
    tail_at = (last_B + tails_before_B)[is_padded_B]
    cu_seqlens = np.zeros(len(at_I) + len(tail_at) + 1, dtype=np.int32)
    cu_seqlens[1 + at_I] = ends[1:] + (row_ends_B - width - ends[first_B]).repeat(seg_count_B)
    cu_seqlens[1 + tail_at] = row_ends_B[is_padded_B]
    numbers_N = np.full(len(cu_seqlens) - 1, -1, dtype=np.int32)
    numbers_N[at_I] = np.arange(len(seg_len_I)) - first_B.repeat(seg_count_B)
    return HostBatch(
        tokens_BT=tokens_BT,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        numbers_N=torch.from_numpy(numbers_N),
        source_B=torch.from_numpy(source_B),
        samples_B=torch.from_numpy(samples_B.copy()),
    )


class BatchReader:
    """Reads batches of one split in one order; `pinned` memory is what a GPU copies from without waiting."""

    def __init__(self, dataset: TokenDataset, order: Order, split: str = "train", pinned: bool = False) -> None:
        self._dataset, self._order, self._split, self._pinned = dataset, order, split, pinned

    def read(self, positions: Int64Array) -> HostBatch:
        """The rows at these positions (int64 [B], B >= 1), in the order asked.

        Raises:
            DataError: one of the rows is damaged.
        """
        source_B, row_B = self._order.rows(positions)
        shape = (len(positions), self._dataset.seq_len)
        tokens_BT = torch.empty(shape, dtype=torch.int16, pin_memory=self._pinned)
        raw = self._dataset.read(self._split, source_B, row_B, into=tokens_BT.numpy().view(np.uint16))
        return host_batch(tokens_BT, raw.seg_count_R, raw.seg_len_I, source_B, positions)


def eval_reader(dataset: TokenDataset, source: str) -> BatchReader:
    """A reader of a source's held-out rows in file order; positions are row numbers."""
    return BatchReader(dataset, FileOrder(dataset.source_index(source)), "eval")


class Prefetcher(Iterator[HostBatch]):
    """Iterates over batches that one background thread reads up to `depth` ahead.

    An error in the thread is raised here, at the batch it belongs to. Use it as a context manager, or call `close`.
    """

    def __init__(self, reader: BatchReader, positions: Iterable[Int64Array], depth: int) -> None:
        assert depth >= 1, f"with {depth} batches ahead none would ever be read"
        # A simple queue is a few microseconds cheaper than one with a size; the places in it are a queue themselves.
        self._ready: queue.SimpleQueue[HostBatch | BaseException | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._places.put(None)
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(reader, positions), name="rxt-prefetch", daemon=True)
        self._thread.start()

    def _work(self, reader: BatchReader, positions: Iterable[Int64Array]) -> None:
        try:
            for wanted in positions:
                self._places.get()
                if self._closed:
                    return
                self._ready.put(reader.read(wanted))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def __next__(self) -> HostBatch:
        if self._closed:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, HostBatch):
            self._places.put(None)
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it; batches not yet taken are dropped."""
        self._closed = True
        self._places.put(None)
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(reader: BatchReader, positions: Iterable[Int64Array], depth: int = 2) -> Prefetcher:
    """Start reading the batches of `positions` in a background thread, at most `depth` ahead."""
    return Prefetcher(reader, positions, depth)
