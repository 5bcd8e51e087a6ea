"""Best-fit packing of documents into rows of fixed length.

Documents are packed in windows of 4,096: long enough that the rows of a window fill almost completely (about 0.1 %
padding at 8,192 tokens a row), short enough that memory stays bounded and a window is packed in milliseconds. Only a
document longer than a row is ever cut: into full rows and one remainder. Every token stands in exactly one row.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rxt_dist.data.format import BOS_ID, EOS_ID, PAD_ID, PackedRows

PACKING_VERSION = 1
WINDOW_DOCUMENTS = 4096


class Piece(NamedTuple):
    """`length` tokens of the window's document `document`, from token `offset` on (BOS is token 0)."""

    document: int
    offset: int
    length: int


def plan_rows(lengths: list[int], seq_len: int) -> list[list[Piece]]:
    """Assign documents of these lengths (BOS and EOS included) to rows of `seq_len` tokens.

    Full rows cut from long documents come first, in document order; then best-fit decreasing: the longest piece goes
    where it leaves the least room. Deterministic. The free space of all open rows is one integer used as a bit set, so
    that "the smallest free space of at least n" is two machine-level operations instead of a search.
    """
    rows: list[list[Piece]] = []
    rest: list[Piece] = []
    for document, length in enumerate(lengths):
        full = length - length % seq_len if length > seq_len else 0
        rows.extend([Piece(document, offset, seq_len)] for offset in range(0, full, seq_len))
        if length > full:
            rest.append(Piece(document, full, length - full))
    rest.sort(key=lambda piece: -piece.length)
    rows_with_space: list[list[int]] = [[] for _ in range(seq_len + 1)]
    spaces = 0  # bit n is set where some open row has exactly n tokens of space
    for piece in rest:
        fitting = spaces >> piece.length
        if fitting:
            space = piece.length + (fitting & -fitting).bit_length() - 1
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                spaces ^= 1 << space
        else:
            space, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(piece)
        left = space - piece.length
        if left:
            rows_with_space[left].append(row)
            spaces |= 1 << left
    return rows


def pack(documents: list[npt.NDArray[np.uint16]], ordinals: list[int], seq_len: int) -> PackedRows:
    """Pack documents (text ids only, uint16 [n] each; no special ids) into rows, adding BOS and EOS.

    `ordinals` are the documents' numbers in their unit, stored with every segment. Returns R rows of `seq_len`.
    """
    lengths = [len(ids) + 2 for ids in documents]
    rows = plan_rows(lengths, seq_len)
    bos, eos = np.array([BOS_ID], dtype=np.uint16), np.array([EOS_ID], dtype=np.uint16)
    # One flat array of all framed documents: a piece is then one slice of it.
    framed = np.concatenate([part for ids in documents for part in (bos, ids, eos)]) if documents else bos[:0]
    starts = [0, *accumulate(lengths)]
    tokens_RT = np.full((len(rows), seq_len), PAD_ID, dtype=np.uint16)
    for row, pieces in enumerate(rows):
        at = 0
        for piece in pieces:
            start = starts[piece.document] + piece.offset
            tokens_RT[row, at : at + piece.length] = framed[start : start + piece.length]
            at += piece.length
    flat = [piece for pieces in rows for piece in pieces]
    return PackedRows(
        tokens_RT,
        np.array([len(pieces) for pieces in rows], dtype=np.int64),
        np.array([piece.length for piece in flat], dtype=np.uint16),
        np.array([ordinals[piece.document] for piece in flat], dtype=np.uint32),
        np.array([piece.offset for piece in flat], dtype=np.uint32),
    )
