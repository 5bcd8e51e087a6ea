from __future__ import annotations

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rxt_dist.data.packing import PACKING_VERSION, WINDOW_DOCUMENTS, lay_out_rows, pack
from rxt_dist.data.rows import BOS_ID, EOS_ID, MAX_SEQ_LEN, PAD_ID, PackedRows, check_rows


def _rebuild(rows: PackedRows) -> dict[int, list[int]]:
    """Documents by ordinal, put together from their segments, checking that no token stands twice."""
    pieces: dict[int, dict[int, list[int]]] = {}
    at = 0
    for row in range(rows.rows):
        start = 0
        for _ in range(int(rows.seg_count_R[row])):
            length, document, offset = (int(c[at]) for c in (rows.seg_len_I, rows.seg_doc_I, rows.seg_off_I))
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
    layout = lay_out_rows(lengths, seq_len)
    row_of = np.repeat(np.arange(len(layout.count_R)), layout.count_R)
    assert (np.bincount(row_of, weights=layout.length_I) <= seq_len).all()
    whole = np.array(lengths, dtype=np.int64)[layout.document_I]
    assert ((layout.length_I == whole) | (whole > seq_len)).all()


def test_windows_of_web_like_documents_fill_their_rows() -> None:
    """At most 0.2 % padding in all, and no document cut that a row holds."""
    tokens = rows = 0
    for seed in range(6):
        lengths = np.random.default_rng(seed).lognormal(6.3, 1.1, WINDOW_DOCUMENTS).astype(int) + 2
        layout = lay_out_rows(lengths, 8192)
        whole = lengths[layout.document_I]
        assert (whole[layout.length_I < whole] > 8192).all()
        assert layout.length_I.sum() == lengths.sum()
        tokens, rows = tokens + lengths.sum(), rows + len(layout.count_R)
    assert 1 - tokens / (rows * 8192) <= 0.002


def test_a_segment_may_fill_the_longest_row() -> None:
    rows = pack([np.full(70_000, 9999, dtype=np.uint16)], [4], MAX_SEQ_LEN)
    assert rows.seg_len_I.tolist() == [65_535, 70_002 - 65_535]
    assert rows.seg_off_I.tolist() == [0, 65_535]


def test_packing_is_deterministic_and_takes_the_tightest_space() -> None:
    layout = lay_out_rows([6, 5, 4, 3], 10)
    assert (layout.document_I.tolist(), layout.count_R.tolist()) == ([0, 2, 1, 3], [2, 2])


def test_the_rows_of_packing_version_1_never_change() -> None:
    """Stored digests: web-like and short documents, many of one length, documents longer than several rows."""
    rng = np.random.default_rng(5)
    windows = {
        "51479b42581fcdddfddeec2c290bc64e": (np.exp(rng.normal(6.3, 1.1, 4096)).astype(int) + 1, 8192),
        "577f4bc105a97c88640de7afa0fbe385": (np.exp(rng.normal(6.3, 1.5, 2000)).astype(int) + 1, 1024),
        "4415df415f7f3091543089e021690cae": (rng.integers(1, 12, 4096), 64),
        "1966fce8e48fc5893833a221d5718c38": (rng.integers(0, 700, 300), 100),
    }
    assert PACKING_VERSION == 1
    for wanted, (lengths, seq_len) in windows.items():
        documents = [(np.arange(length) * 7 + n).astype(np.uint16) for n, length in enumerate(lengths.tolist())]
        rows = pack(documents, [3 * n for n in range(len(documents))], seq_len)
        digest = hashlib.sha256()
        for column in (rows.tokens_RT, rows.seg_count_R, rows.seg_len_I, rows.seg_doc_I, rows.seg_off_I):
            digest.update(f"{column.dtype.str}{column.shape}".encode())
            digest.update(column.tobytes())
        assert digest.hexdigest()[:32] == wanted
