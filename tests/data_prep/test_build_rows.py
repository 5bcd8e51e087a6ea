"""Every token of every document, once: from texts through a unit's shards to the order that training reads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.building import rowstream
from data_prep.building.rowstream import Ids
from data_prep.corpora import Document, ReadCounts
from data_prep.documents import unit as unit_module
from data_prep.documents.unit import DocumentWork, _Item, _SourceBuilder
from data_prep.shards.rows import scan
from data_prep.units import Unit
from rxt_dist.data.manifest import SourceInfo, SplitInfo
from rxt_dist.data.rows import BOS_ID, EOS_ID, SPECIAL_COUNT
from rxt_dist.data.sampler import GlobalOrder, OrderSource, Phase
from rxt_dist.data.writer import ShardSpec

UNIT = Unit("u00000", (), 1)


class FakeBackend:
    """Ids that follow from the text "LENGTH NAME"; every text has an id 65,535 where it has any."""

    name = "fake"

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        return [_ids(text) for text in texts]


def _ids(text: str) -> npt.NDArray[np.uint16]:
    length = int(text.split()[0])
    ids = np.random.default_rng(list(text.encode())).integers(SPECIAL_COUNT, 65_536, length, dtype=np.uint16)
    ids[length // 2 : length // 2 + 1] = 65_535
    return ids


def _build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, texts: list[str], seq_len: int, eval_fraction: float
) -> dict[str, SourceInfo]:
    def read(unit: Unit, counts: ReadCounts) -> Iterator[Document]:
        for i, text in enumerate(texts):
            yield Document(text, "en", f"source{i % 2}", str(i))

    monkeypatch.setattr(unit_module, "read_unit", read)
    monkeypatch.setattr(unit_module, "open_backend", lambda *arguments: FakeBackend())
    shutil.rmtree(tmp_path, ignore_errors=True)
    (tmp_path / "units").mkdir(parents=True)
    work = DocumentWork(tmp_path, ShardSpec(seq_len, 65_536, "none", 1, "none"), eval_fraction, "fake")
    work.open()(UNIT, lambda text_bytes, tokens: None)
    content: dict[str, Any] = json.loads((tmp_path / "units" / "u00000.json").read_text())
    return {value["name"]: SourceInfo.from_dict(value) for value in content["sources"]}


def _documents(root: Path, sources: dict[str, SourceInfo], seq_len: int) -> dict[int, list[int]]:
    """Every document by its ordinal, put together from the pieces in the rows; padding is looked at too."""
    pieces: dict[int, dict[int, list[int]]] = {}
    for source in sources.values():
        for split in (source.train, source.eval):
            for rows in scan(root, split.shards, seq_len):
                segment = 0
                for row in range(rows.rows):
                    at = 0
                    for _ in range(int(rows.seg_count_R[row])):
                        length = int(rows.seg_len_I[segment])
                        of_document = pieces.setdefault(int(rows.seg_doc_I[segment]), {})
                        offset = int(rows.seg_off_I[segment])
                        assert offset not in of_document
                        of_document[offset] = rows.tokens_RT[row, at : at + length].tolist()
                        at += length
                        segment += 1
                    assert not rows.tokens_RT[row, at:].any()
    whole = {}
    for ordinal, by_offset in pieces.items():
        whole[ordinal] = [token for offset in sorted(by_offset) for token in by_offset[offset]]
        assert sorted(by_offset) == list(np.cumsum([0, *(len(by_offset[o]) for o in sorted(by_offset))])[:-1])
    return whole


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.one_of(st.integers(1, 40), st.integers(1, 400)), min_size=1, max_size=60),
    seq_len=st.integers(2, 100),
    window=st.integers(1, 20),
    window_tokens=st.sampled_from([50, 1 << 23]),
    eval_fraction=st.sampled_from([0.0, 0.02, 0.5]),
)
def test_every_token_of_every_document_stands_in_exactly_one_row(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lengths: list[int],
    seq_len: int,
    window: int,
    window_tokens: int,
    eval_fraction: float,
) -> None:
    monkeypatch.setattr(rowstream, "WINDOW_DOCUMENTS", window)
    monkeypatch.setattr(rowstream, "_WINDOW_TOKENS", window_tokens)
    texts = [f"{length} d{i}" for i, length in enumerate(lengths)]
    root = tmp_path / "out"
    sources = _build(root, monkeypatch, texts, seq_len, eval_fraction)
    found = _documents(root, sources, seq_len)
    assert found == {i: [BOS_ID, *_ids(text).tolist(), EOS_ID] for i, text in enumerate(texts)}
    assert all(65_535 in ids for ids in found.values())
    for source in sources.values():
        for split in (source.train, source.eval):
            totals = split.totals
            assert (
                totals.tokens + totals.padding == totals.rows * seq_len == sum(s.rows for s in split.shards) * seq_len
            )
    assert sum(s.train.totals.documents + s.eval.totals.documents for s in sources.values()) == len(texts)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(1, 3000), min_size=1, max_size=3), seed=st.integers(0, 2**32))
@pytest.mark.slow
def test_every_row_is_read_exactly_once_an_epoch(rows: list[int], seed: int) -> None:
    for number, count in enumerate(rows):
        weights = tuple(2**32 if i == number else 0 for i in range(len(rows)))
        sources = [OrderSource(f"s{i}", n) for i, n in enumerate(rows)]
        order = GlobalOrder(sources, [Phase(3 * count * 8, weights)], seed, 8)
        # A source read alone passes over its rows epoch by epoch, but for the mixing within blocks of 4,096 positions.
        blocks = -(-3 * count // 4096) * 4096
        source_R, row_R = order.rows(np.arange(blocks))
        assert set(source_R.tolist()) == {number}
        times = np.bincount(row_R, minlength=count)
        assert {int(n) for n in times} <= {blocks // count, -(-blocks // count)}


def test_a_small_window_cuts_nothing_that_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowstream, "_WINDOW_TOKENS", 50)
    sources = _build(tmp_path / "out", monkeypatch, [f"{n} d" for n in (62, 63, 10, 126, 1)], 64, 0.0)
    assert sum(source.train.totals.split_documents for source in sources.values()) == 2


class _Sink:
    """Keeps what would become rows."""

    def __init__(self) -> None:
        self.items: list[Ids] = []

    def add(self, item: Ids) -> None:
        self.items.append(item)

    def finish(self) -> SplitInfo:
        return SplitInfo()


def test_equal_documents_that_wait_are_in_memory_once() -> None:
    sinks = {"train": _Sink(), "eval": _Sink()}
    builder = _SourceBuilder("en", sinks, 0.02)  # type: ignore[arg-type]
    for ordinal in range(5):
        item = _Item(ordinal, "en", "en", 10, 0, held_out_rank=2**63)
        builder.add(item, np.array([20, 21 + (ordinal == 3)], dtype=np.uint16))  # one of them has only an equal hash
    builder.finish("en")
    ids = [item.ids for item in sinks["train"].items + sinks["eval"].items]
    assert len(ids) == 5
    assert len({id(array) for array in ids}) == 2
    assert [array.tolist() for array in ids] == [[20, 21], [20, 21], [20, 21], [20, 22], [20, 21]]
