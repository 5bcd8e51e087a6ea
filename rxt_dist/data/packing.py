"""Best-fit packing of documents into rows of fixed length.

Documents are packed in windows of 4,096: long enough that the rows of a window fill almost completely (about 0.1 %
padding at 8,192 tokens a row), short enough that memory stays bounded and a window is packed in milliseconds. Only a
document longer than a row is ever cut: into full rows and one remainder. Every token stands in exactly one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rxt_dist.data.rows import BOS_ID, EOS_ID, PackedRows

PACKING_VERSION = 1
WINDOW_DOCUMENTS = 4096

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowLayout:
    """R rows of I segments in all, in row order and, within a row, in the order in which they stand.

    Segment i is `length_I[i]` tokens of the window's document `document_I[i]`, from token `offset_I[i]` on (BOS is
    token 0). `count_R` is the number of segments in each row. All int64.
    """

    document_I: Int64Array
    offset_I: Int64Array
    length_I: Int64Array
    count_R: Int64Array


def lay_out_rows(lengths: Sequence[int] | Int64Array, seq_len: int) -> RowLayout:
    """Assign documents of these lengths (BOS and EOS included, so at least 1) to rows of `seq_len` tokens.

    Full rows cut from long documents come first, in document order; then best-fit decreasing: the longest piece goes
    where it leaves the least room. Deterministic.
    """
    length_A = np.asarray(lengths, dtype=np.int64)
    full_A = np.where(length_A > seq_len, length_A // seq_len, 0)
    rows = int(full_A.sum())
    full_document = np.repeat(np.arange(len(length_A)), full_A)
    full_offset = (np.arange(rows) - np.repeat(full_A.cumsum() - full_A, full_A)) * seq_len
    rest_A = length_A - full_A * seq_len
    # What is left, longest first; equal ones stay in document order.
    longest_first = np.argsort(-rest_A, kind="stable")
    rest = longest_first[: int(np.count_nonzero(rest_A))]
    row_of_rest = _best_fit(rest_A[rest], seq_len) + rows
    by_row = np.argsort(row_of_rest, kind="stable")
    rest = rest[by_row]
    return RowLayout(
        document_I=np.concatenate([full_document, rest]),
        offset_I=np.concatenate([full_offset, (full_A * seq_len)[rest]]),
        length_I=np.concatenate([np.full(rows, seq_len), rest_A[rest]]),
        count_R=np.bincount(np.concatenate([np.arange(rows), row_of_rest])),
    )


def _best_fit(length_A: Int64Array, seq_len: int) -> Int64Array:
    """The row of each piece (int64 [A]), given pieces from the longest to the shortest: best-fit decreasing.

    A row that takes a piece of some length and has room for more of that length takes those too: its space was the
    smallest that fits, and became smaller. So pieces of one length are placed row by row, not one by one. The spaces of
    open rows are a bit set in two levels, so that "the smallest space of at least n" is a few operations on integers of
    about 100 bits; rows of equal space are a stack, linked through `below`.
    """
    bits = (seq_len.bit_length() + 1) // 2
    mask = (1 << bits) - 1
    words = [0] * ((seq_len >> bits) + 1)  # bit n of all words together: some open row has exactly n tokens of space
    filled = 0  # bit i: words[i] is not 0
    top, below = [-1] * (seq_len + 1), list[int]()
    rows, taken = list[int](), list[int]()
    values, counts = np.unique(length_A, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = length >> bits
            word = words[at] >> (length & mask)
            if word:
                space = length + (word & -word).bit_length() - 1
            elif higher := filled >> (at + 1):
                at += (higher & -higher).bit_length()
                word = words[at]
                space = (at << bits) + (word & -word).bit_length() - 1
            else:
                space, row = seq_len, len(below)
                below.append(-1)
                at = -1
            if at >= 0:
                row = top[space]
                top[space] = below[row]
                if top[space] < 0:
                    words[at] ^= 1 << (space & mask)
                    if not words[at]:
                        filled ^= 1 << at
            take = min(count, space // length)
            rows.append(row)
            taken.append(take)
            count -= take
            left = space - take * length
            if left:
                below[row] = top[left]
                top[left] = row
                at = left >> bits
                words[at] |= 1 << (left & mask)
                filled |= 1 << at
    return np.repeat(np.array(rows, dtype=np.int64), taken)


def pack(documents: Sequence[npt.NDArray[np.uint16]], ordinals: Sequence[int], seq_len: int) -> PackedRows:
    """Pack documents (text ids only, uint16 [n] each; no special ids) into rows, adding BOS and EOS.

    `ordinals` are the documents' numbers in their unit, stored with every segment. Returns R rows of `seq_len`.
    """
    text_A = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    layout = lay_out_rows(text_A + 2, seq_len)
    document_I, offset_I, length_I, count_R = layout.document_I, layout.offset_I, layout.length_I, layout.count_R
    tokens_RT = np.zeros((len(count_R), seq_len), dtype=np.uint16)  # PAD is 0
    flat = tokens_RT.reshape(-1)
    # Each row's pieces stand one after the other: where all would stand without padding, plus the padding before.
    ends = length_I.cumsum()
    padding_R = seq_len - np.diff(ends[count_R.cumsum() - 1], prepend=0)
    ends += np.repeat(padding_R.cumsum() - padding_R, count_R)
    starts = ends - length_I
    opens, closes = offset_I == 0, offset_I + length_I == text_A[document_I] + 2
    first, last = offset_I - 1 + opens, offset_I + length_I - 1 - closes
    pieces = zip(document_I.tolist(), first.tolist(), last.tolist(), (starts + opens).tolist(), strict=True)
    for document, begin, end, at in pieces:
        flat[at : at + end - begin] = documents[document][begin:end]
    flat[starts[opens]] = BOS_ID
    flat[ends[closes] - 1] = EOS_ID
    return PackedRows(
        tokens_RT,
        count_R,
        length_I.astype(np.uint16),
        np.asarray(ordinals, dtype=np.uint32)[document_I],
        offset_I.astype(np.uint32),
    )
