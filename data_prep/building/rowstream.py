"""Items that are already ids, on their way into packed rows: which split they go to, and their totals."""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from rxt_dist.data.manifest import SplitInfo, Totals
from rxt_dist.data.packing import WINDOW_DOCUMENTS, pack
from rxt_dist.data.writer import ShardWriter
from rxt_dist.errors import ConfigError

T = TypeVar("T")
_WINDOW_TOKENS = 1 << 23  # a window of very long documents ends here, to bound memory


def require_fraction(eval_fraction: float) -> None:
    """Raise ConfigError unless it is a share of the documents that may be held out."""
    if not 0 <= eval_fraction < 1:
        raise ConfigError(f"--eval-fraction is {eval_fraction}; it must be at least 0 and below 1.")


class HeldOut(Generic[T]):
    """Sends items to "train" or "eval" by a rank that is a 64-bit hash of their content.

    An item is held out when its rank falls below the fraction: equal ones go to one side, wherever they stand. So that
    a small source is not left without any, the item with the smallest rank waits, with its equals; if no other was held
    out by the end, they are, unless they are all there is. Only then may an equal one of another unit or source, which
    is not seen here, be on the other side.
    """

    def __init__(self, fraction: float) -> None:
        self._bound = int(fraction * 2**64)
        self._waiting: list[T] = []
        self._waiting_rank = 0
        self._any_held_out = fraction == 0
        self._any_trained = False

    def add(self, rank: int, item: T) -> list[tuple[str, T]]:
        """(split, item) of what is decided now: this item, or those that waited until now, or nothing."""
        if rank < self._bound:
            self._any_held_out = True
            return [("eval", item)]
        if not self._any_held_out and (not self._waiting or rank <= self._waiting_rank):
            if self._waiting and rank == self._waiting_rank:
                self._waiting.append(item)
                return []
            decided, self._waiting, self._waiting_rank = self._waiting, [item], rank
        else:
            decided = [item]
        self._any_trained = self._any_trained or bool(decided)
        return [("train", one) for one in decided]

    def waiting(self, rank: int) -> T | None:
        """The first of the items of this rank that wait, if any do."""
        return self._waiting[0] if self._waiting and rank == self._waiting_rank else None

    def finish(self) -> list[tuple[str, T]]:
        """Where the items go that still wait, if any do."""
        split = "train" if self._any_held_out or not self._any_trained else "eval"
        return [(split, item) for item in self._waiting]


class Ids(NamedTuple):
    """One document as ids, uint16 [n] without BOS and EOS."""

    ordinal: int
    ids: npt.NDArray[np.uint16]
    text_bytes: int
    literals: int = 0


class RowStream:
    """The documents of one source and split within a unit, packed window by window into shards."""

    def __init__(self, writer: ShardWriter, seq_len: int) -> None:
        self._writer, self._seq_len = writer, seq_len
        self._window: list[Ids] = []
        self._window_tokens = 0
        self._totals = Totals()

    def add(self, item: Ids) -> None:
        self._window.append(item)
        self._window_tokens += len(item.ids) + 2
        if len(self._window) == WINDOW_DOCUMENTS or self._window_tokens >= _WINDOW_TOKENS:
            self._flush()

    def finish(self) -> SplitInfo:
        self._flush()
        return SplitInfo(self._totals, self._writer.finish())

    def _flush(self) -> None:
        if not self._window:
            return
        window, tokens = self._window, self._window_tokens
        self._window, self._window_tokens = [], 0
        rows = pack([item.ids for item in window], [item.ordinal for item in window], self._seq_len)
        self._totals += Totals(
            documents=len(window),
            tokens=tokens,
            rows=rows.rows,
            padding=rows.tokens_RT.size - tokens,
            text_bytes=sum(item.text_bytes for item in window),
            split_documents=sum(len(item.ids) + 2 > self._seq_len for item in window),
            escaped_literals=sum(item.literals for item in window),
        )
        del window  # the writer may hold several copies of a batch of rows
        self._writer.add(rows)
