from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.format import BOS_ID, EOS_ID, PAD_ID, PackedRows, check_rows
from rxt_dist.data.packing import pack, plan_rows


def _rebuild(rows: PackedRows) -> dict[int, list[int]]:
    """Documents by ordinal, put together from their segments, checking that no token stands twice."""
    pieces: dict[int, dict[int, list[int]]] = {}
    at = 0
    for row in range(rows.rows):
        start = 0
        for _ in range(int(rows.seg_count_R[row])):
            length, document, offset = (int(c[at]) for c in (rows.seg_len_S, rows.seg_doc_S, rows.seg_off_S))
            of_document = pieces.setdefault(document, {})
            assert offset not in of_document
            of_document[offset] = rows.tokens_RT[row, start : start + length].tolist()
            start, at = start + length, at + 1
        assert (rows.tokens_RT[row, start:] == PAD_ID).all()
    documents = {}
    for document, by_offset in pieces.items():
        joined: list[int] = []
        for offset in sorted(by_offset):
            assert offset == len(joined)
            joined += by_offset[offset]
        documents[document] = joined
    return documents


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 70), max_size=60), st.integers(2, 40))
def test_every_token_of_every_document_exactly_once(lengths: list[int], seq_len: int) -> None:
    documents = [(np.arange(length) + 11 + 100 * n).astype(np.uint16) for n, length in enumerate(lengths)]
    rows = pack(documents, [n + 7 for n in range(len(documents))], seq_len)
    check_rows(rows, 65_536)
    wanted = {n + 7: [BOS_ID, *ids.tolist(), EOS_ID] for n, ids in enumerate(documents)}
    assert _rebuild(rows) == wanted


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(3, 70), max_size=60), st.integers(2, 40))
def test_only_documents_longer_than_a_row_are_cut(lengths: list[int], seq_len: int) -> None:
    for row in plan_rows(lengths, seq_len):
        assert sum(piece.length for piece in row) <= seq_len
        for piece in row:
            assert piece.length == lengths[piece.document] or lengths[piece.document] > seq_len


def test_a_window_of_web_like_documents_fills_its_rows() -> None:
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.normal(6, 1.1, 4096)).astype(int) + 2
    rows = plan_rows(lengths.tolist(), 2048)
    assert 1 - lengths.sum() / (len(rows) * 2048) < 0.005


def test_packing_is_deterministic_and_takes_the_tightest_space() -> None:
    rows = plan_rows([6, 5, 4, 3], 10)
    assert [[piece.document for piece in row] for row in rows] == [[0, 2], [1, 3]]
