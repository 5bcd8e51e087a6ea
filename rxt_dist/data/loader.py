"""From positions to a `TokenBatch`, with one thread that reads ahead.

Reading a batch costs tens of microseconds, so worker processes would only add copies; one thread hides the rest. What
is read stays as small as it is on disk: 16-bit ids and the bounds of documents. It stays in host memory until a stage
has made micro-batches of it, so that nobody asks a device what the host knows: lengths, bounds, targets.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from rxt_dist.data.dataset import RowReader
from rxt_dist.data.masking import IGNORED_LABEL
from rxt_dist.data.rows import PAD_ID

Int64Array = npt.NDArray[np.int64]
WantedT = TypeVar("WantedT")
ReadT = TypeVar("ReadT")


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
class TokenBatch:
    """B rows of T tokens as they were read, in host memory.

    tokens_BT: int16, the bits of the stored uint16 ids (torch knows few operations on uint16).
    cu_seqlens: int32 [I + 1] bounds of all segments in the flattened B * T tokens, from 0 to B * T; the padding tail
        of a row is a segment of its own, so no segment spans two rows.
    numbers_I: int32 number of each segment within its row, from 0; -1 for a padding tail.
    source_B: int64 index of each row's source in the dataset's sources.
    samples_B: int64 global position of each row; the key of all randomness that concerns it.
    """

    tokens_BT: torch.Tensor
    cu_seqlens: torch.Tensor
    numbers_I: torch.Tensor
    source_B: torch.Tensor
    samples_B: torch.Tensor

    @property
    def rows(self) -> int:
        return int(self.tokens_BT.shape[0])

    @cached_property
    def real_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self._document_lengths.sum())

    @cached_property
    def pairs(self) -> int:
        """Query-key pairs of full attention within documents: the sum of their squared lengths."""
        return int((self._document_lengths**2).sum())

    @property
    def _document_lengths(self) -> torch.Tensor:
        return self.cu_seqlens.diff().long()[self.numbers_I >= 0]

    def micro_batches(self, rows: int) -> list[TokenBatch]:
        """Split into consecutive batches of `rows` rows.

        Raises:
            ValueError: B is not a multiple of `rows`.
        """
        if rows < 1 or self.rows % rows:
            raise ValueError(f"a batch of {self.rows} rows cannot be split into micro-batches of {rows}")
        width = self.tokens_BT.shape[1]
        # Every row ends a segment, so the ends of micro-batches are entries of cu_seqlens.
        ends = torch.searchsorted(self.cu_seqlens, torch.arange(0, self.rows + 1, rows, dtype=torch.int32) * width)
        parts = []
        for start, (first, last) in zip(range(0, self.rows, rows), pairwise(ends.tolist()), strict=True):
            part = slice(start, start + rows)
            parts.append(
                TokenBatch(
                    tokens_BT=self.tokens_BT[part],
                    cu_seqlens=self.cu_seqlens[first : last + 1] - start * width,
                    numbers_I=self.numbers_I[first:last],
                    source_B=self.source_B[part],
                    samples_B=self.samples_B[part],
                )
            )
        return parts

    def first(self, rows: int) -> TokenBatch:
        """The batch with only its first `rows` rows; the others become padding, which counts for nothing."""
        tokens_BT, numbers_I = self.tokens_BT.clone(), self.numbers_I.clone()
        tokens_BT[rows:] = PAD_ID
        numbers_I[self.cu_seqlens[:-1] >= rows * self.tokens_BT.shape[1]] = -1
        return replace(self, tokens_BT=tokens_BT, numbers_I=numbers_I)

    def unpack(self) -> TokenRows:
        """What the network and the losses need to know of each token."""
        shape, total = self.tokens_BT.shape, self.tokens_BT.numel()
        lengths_I = self.cu_seqlens.diff()
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], lengths_I, output_size=total)
        segments = torch.repeat_interleave(self.numbers_I, lengths_I, output_size=total)
        return TokenRows(
            tokens_BT=self.tokens_BT.to(torch.int64).bitwise_and_(0xFFFF),
            positions_BT=torch.arange(total).sub_(starts).view(shape),
            segments_BT=segments.view(shape),
            cu_seqlens=self.cu_seqlens,
        )


@dataclass(frozen=True)
class TokenRows:
    """B rows of T tokens, with everything that attention and the losses need to keep documents apart.

    tokens_BT: int64 ids, PAD (0) after the last document of a row.
    positions_BT: int64 position within the document piece, from 0 (the padding tail counts from 0 as well).
    segments_BT: int32 number of the document within its row, from 0; -1 on padding.
    cu_seqlens: as in `TokenBatch`.
    """

    tokens_BT: torch.Tensor
    positions_BT: torch.Tensor
    segments_BT: torch.Tensor
    cu_seqlens: torch.Tensor

    def next_tokens(self) -> torch.Tensor:
        """int64 [B, T]: the next token within the document; -100 on padding and on each document's last token."""
        labels = self.tokens_BT.flatten().roll(-1).masked_fill_(self.segments_BT.flatten() < 0, IGNORED_LABEL)
        labels[self.cu_seqlens[1:] - 1] = IGNORED_LABEL
        return labels.view_as(self.tokens_BT)


def token_batch(
    tokens_BT: torch.Tensor,
    seg_count_B: Int64Array,
    seg_len_I: Int64Array,
    source_B: Int64Array,
    samples_B: Int64Array,
) -> TokenBatch:
    """Bounds of all segments from the stored lengths (without looking for EOS), each row's padding after its documents.

    Args:
        tokens_BT: int16 [B, T], as in `TokenBatch`.
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
    numbers_I = np.full(len(cu_seqlens) - 1, -1, dtype=np.int32)
    numbers_I[at_I] = np.arange(len(seg_len_I)) - first_B.repeat(seg_count_B)
    return TokenBatch(
        tokens_BT=tokens_BT,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        numbers_I=torch.from_numpy(numbers_I),
        source_B=torch.from_numpy(source_B),
        samples_B=torch.from_numpy(samples_B.copy()),
    )


class BatchReader:
    """Reads batches of one split in one order."""

    def __init__(self, dataset: RowReader, order: Order, split: str = "train") -> None:
        self._dataset, self._order, self._split = dataset, order, split

    def read(self, positions: Int64Array) -> TokenBatch:
        """The rows at these positions (int64 [B], B >= 1), in the order asked.

        Raises:
            DataError: one of the rows is damaged.
        """
        source_B, row_B = self._order.rows(positions)
        tokens_BT = torch.empty((len(positions), self._dataset.seq_len), dtype=torch.int16)
        raw = self._dataset.read(self._split, source_B, row_B, into=tokens_BT.numpy().view(np.uint16))
        return token_batch(tokens_BT, raw.seg_count_R, raw.seg_len_I, source_B, positions)


def eval_reader(dataset: RowReader, source: int) -> BatchReader:
    """A reader of a source's held-out rows in file order; positions are row numbers."""
    return BatchReader(dataset, FileOrder(source), "eval")


class Prefetcher(Iterator[ReadT], Generic[WantedT, ReadT]):
    """Iterates over batches that one background thread reads up to `depth` ahead.

    An error in the thread is raised here, at the batch it belongs to. Use it as a context manager, or call `close`.
    """

    def __init__(self, read: Callable[[WantedT], ReadT], wanted: Iterable[WantedT], depth: int) -> None:
        assert depth >= 1, f"with {depth} batches ahead none would ever be read"
        # A simple queue is a few microseconds cheaper than one with a size; the places in it are a queue themselves.
        self._ready: queue.SimpleQueue[tuple[ReadT] | BaseException | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(depth):
            self._places.put(None)
        self._closed = False
        self._thread = threading.Thread(target=self._work, args=(read, wanted), name="rxt-prefetch", daemon=True)
        self._thread.start()

    def _work(self, read: Callable[[WantedT], ReadT], wanted: Iterable[WantedT]) -> None:
        try:
            for one in wanted:
                self._places.get()
                if self._closed:
                    return
                self._ready.put((read(one),))
            self._ready.put(None)
        except BaseException as error:
            self._ready.put(error)

    def __next__(self) -> ReadT:
        if self._closed:
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, tuple):
            self._places.put(None)
            return item[0]
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it; batches not yet taken are dropped."""
        self._closed = True
        self._places.put(None)
        self._thread.join()

    def __enter__(self) -> Prefetcher[WantedT, ReadT]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(read: Callable[[WantedT], ReadT], wanted: Iterable[WantedT], depth: int = 2) -> Prefetcher[WantedT, ReadT]:
    """Start reading what is wanted in a background thread, at most `depth` ahead."""
    return Prefetcher(read, wanted, depth)
