"""From positions to a `Batch`, with one thread that reads ahead.

Reading a batch costs tens of microseconds, so worker processes would only add copies; one thread hides the rest.
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

from rxt_dist.data.dataset import RawRows, TokenDataset
from rxt_dist.data.masking import IGNORED_LABEL

Int64Array = npt.NDArray[np.int64]


class Order(Protocol):
    """Anything that says which row stands at a position: `GlobalOrder` for training, `FileOrder` for evaluation."""

    def rows(self, positions: Int64Array) -> tuple[Int64Array, Int64Array]:
        """Source index and row of each position, int64 [N] each."""
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


def make_batch(raw: RawRows, source_B: Int64Array, samples_B: Int64Array) -> Batch:
    """Boundaries, positions and labels from the stored segment lengths, without looking for EOS."""
    rows, width = raw.tokens_NT.shape
    tokens = raw.tokens_NT.astype(np.int64).reshape(-1)
    row_of = np.repeat(np.arange(rows), raw.seg_count_N)
    padding_B = width - np.bincount(row_of, weights=raw.seg_len_S, minlength=rows).astype(np.int64)
    padded_B = np.flatnonzero(padding_B)
    # One list of segments with each row's padding tail after its documents; numbers count within the row.
    firsts_B = np.cumsum(raw.seg_count_N) - raw.seg_count_N
    tail_at = np.cumsum(raw.seg_count_N)[padded_B]
    lengths = np.insert(raw.seg_len_S, tail_at, padding_B[padded_B])
    numbers = np.insert(np.arange(len(raw.seg_len_S)) - firsts_B[row_of], tail_at, -1).astype(np.int32)
    cu_seqlens = np.concatenate(([0], np.cumsum(lengths)))
    positions = np.arange(rows * width) - np.repeat(cu_seqlens[:-1], lengths)
    segments = np.repeat(numbers, lengths)
    labels = np.empty_like(tokens)
    labels[:-1] = tokens[1:]
    labels[cu_seqlens[1:] - 1] = IGNORED_LABEL
    labels[segments < 0] = IGNORED_LABEL
    shape = (rows, width)
    return Batch(
        tokens_BT=torch.from_numpy(tokens.reshape(shape)),
        labels_BT=torch.from_numpy(labels.reshape(shape)),
        positions_BT=torch.from_numpy(positions.reshape(shape)),
        segments_BT=torch.from_numpy(segments.reshape(shape)),
        cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
        source_B=torch.from_numpy(source_B),
        samples_B=torch.from_numpy(samples_B.copy()),
    )


class BatchReader:
    """Reads batches of one split in one order."""

    def __init__(self, dataset: TokenDataset, order: Order, split: str = "train") -> None:
        self._dataset, self._order, self._split = dataset, order, split

    def read(self, positions: Int64Array) -> Batch:
        """The rows at these positions (int64 [B], B >= 1), in the order asked.

        Raises:
            DataError: a shard that holds one of the rows is damaged.
        """
        source_B, row_B = self._order.rows(positions)
        return make_batch(self._dataset.read(self._split, source_B, row_B), source_B, positions)


def eval_reader(dataset: TokenDataset, source: str) -> BatchReader:
    """A reader of a source's held-out rows in file order; positions are row numbers."""
    return BatchReader(dataset, FileOrder(dataset.source_index(source)), "eval")


class Prefetcher(Iterator[Batch]):
    """Iterates over batches that one background thread reads up to `depth` ahead.

    An error in the thread is raised here, at the batch it belongs to. Use it as a context manager, or call `close`.
    """

    def __init__(self, reader: BatchReader, positions: Iterable[Int64Array], depth: int) -> None:
        self._ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(reader, positions), name="rxt-prefetch", daemon=True)
        self._thread.start()

    def _work(self, reader: BatchReader, positions: Iterable[Int64Array]) -> None:
        try:
            for wanted in positions:
                if not self._put(reader.read(wanted)):
                    return
            self._put(None)
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException | None) -> bool:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.05)
                return True
            except queue.Full:
                continue
        return False

    def __next__(self) -> Batch:
        if self._closed.is_set():
            raise StopIteration
        item = self._ready.get()
        if isinstance(item, Batch):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the thread and wait for it; batches not yet taken are dropped."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def prefetch(reader: BatchReader, positions: Iterable[Int64Array], depth: int = 2) -> Prefetcher:
    """Start reading the batches of `positions` in a background thread, at most `depth` ahead."""
    return Prefetcher(reader, positions, depth)
