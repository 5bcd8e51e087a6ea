"""Rows of tokens: the ids that every tokenizer shares, how documents lie in a row, and what every reader relies on.

Building imports this module, so it imports neither torch nor the tokenizer library.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import xxhash

BOUNDARY_POLICY = "bos-eos"
INTERACTION_BOUNDARIES = "interactions"  # the same, with the parts of an interaction between them
MAX_VOCABULARY = 65_536
MAX_SEQ_LEN = 65_535  # a segment length is a uint16, and a segment may fill the row

SPECIAL_TOKENS: dict[str, int] = {
    "[PAD]": 0, "[UNK]": 1, "[BOS]": 2, "[EOS]": 3, "[MASK]": 4,
    "[Q]": 5, "[A]": 6, "[T]": 7, "[C]": 8, "[U]": 9, "[I]": 10,
}  # fmt: skip
PAD_ID, UNK_ID, BOS_ID, EOS_ID, MASK_ID = 0, 1, 2, 3, 4
SPECIAL_COUNT = len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class PackedRows:
    """R packed rows with I segments in all.

    `tokens_RT` uint16 [R, T], padded with PAD at the end of a row; `seg_count_R` int64 [R], segments in each row;
    `seg_len_I` uint16, `seg_doc_I` uint32 (document ordinal in the unit) and `seg_off_I` uint32 (offset of the piece in
    its document, in tokens, 0 unless the document was cut), each in row order.
    """

    tokens_RT: npt.NDArray[np.uint16]
    seg_count_R: npt.NDArray[np.int64]
    seg_len_I: npt.NDArray[np.uint16]
    seg_doc_I: npt.NDArray[np.uint32]
    seg_off_I: npt.NDArray[np.uint32]

    @property
    def rows(self) -> int:
        return int(self.tokens_RT.shape[0])

    def slice(self, start: int, stop: int) -> PackedRows:
        """Rows [start, stop) with their segments."""
        bounds = np.concatenate(([0], np.cumsum(self.seg_count_R)))
        segments = slice(int(bounds[start]), int(bounds[stop]))
        return PackedRows(
            self.tokens_RT[start:stop],
            self.seg_count_R[start:stop],
            self.seg_len_I[segments],
            self.seg_doc_I[segments],
            self.seg_off_I[segments],
        )


def check_rows(rows: PackedRows, vocab_size: int) -> None:
    """Assert what every reader relies on: ids below the vocabulary, PAD only after the last segment, special ids only
    at a segment's ends (BOS where a document begins, EOS where it may end).

    Raises:
        AssertionError: the packer broke its own rule; this is a bug, never bad input.
    """
    tokens_RT, seq_len = rows.tokens_RT, rows.tokens_RT.shape[1]
    assert int(tokens_RT.max(initial=0)) < vocab_size, f"token id {tokens_RT.max()} >= vocabulary {vocab_size}"
    seg_len = rows.seg_len_I.astype(np.int64)
    row_of = np.repeat(np.arange(rows.rows), rows.seg_count_R)
    used_R = np.bincount(row_of, weights=seg_len, minlength=rows.rows).astype(np.int64)
    assert bool((seg_len > 0).all()), "an empty segment"
    assert bool((used_R <= seq_len).all()), "segments longer than their row"
    ends = np.cumsum(seg_len) + np.repeat(np.cumsum(seq_len - used_R) - (seq_len - used_R), rows.seg_count_R)
    starts = ends - seg_len
    flat = tokens_RT.reshape(-1)
    is_padding = np.arange(seq_len) >= used_R[:, None]
    special = (tokens_RT < SPECIAL_COUNT).reshape(-1)
    assert not bool(tokens_RT[is_padding].any()), "a token other than PAD after the last segment"
    special[is_padding.reshape(-1)] = False
    special[starts[(flat[starts] == BOS_ID) & (rows.seg_off_I == 0)]] = False
    special[ends[flat[ends - 1] == EOS_ID] - 1] = False
    assert not bool(special.any()), "a special id inside a segment"
    assert bool(((flat[starts] == BOS_ID) == (rows.seg_off_I == 0)).all()), "BOS must open exactly the first pieces"


def row_sum(tokens: memoryview, seg_len: memoryview | bytes) -> int:
    """xxh3_64 of one row: its tokens' bytes, then its segment lengths' (both contiguous, little-endian uint16)."""
    digest = xxhash.xxh3_64(tokens)
    digest.update(seg_len)
    return digest.intdigest()


def row_sums(rows: PackedRows) -> npt.NDArray[np.uint64]:
    """`row_sum` of every row, "<u8" [R]."""
    bounds = np.concatenate(([0], np.cumsum(rows.seg_count_R))).tolist()
    sums = [row_sum(rows.tokens_RT[r].data, rows.seg_len_I[bounds[r] : bounds[r + 1]].data) for r in range(rows.rows)]
    return np.array(sums, dtype="<u8")
