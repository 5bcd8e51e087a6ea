from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import BatchReader, eval_reader, prefetch
from rxt_dist.data.sampler import GlobalOrder, Phase, proportional_weights
from rxt_dist.errors import DataError


@pytest.fixture
def dataset(dataset_dir: Path) -> TokenDataset:
    return TokenDataset(dataset_dir)


@pytest.fixture
def order(dataset: TokenDataset) -> GlobalOrder:
    sources = dataset.order_sources()
    rows = [source.rows for source in sources]
    return GlobalOrder(sources, [Phase(sum(rows) * dataset.seq_len, proportional_weights(rows))], 5, dataset.seq_len)


@pytest.fixture
def reader(dataset: TokenDataset, order: GlobalOrder) -> BatchReader:
    return BatchReader(dataset, order)


def test_a_batch_says_what_its_documents_say(dataset: TokenDataset, order: GlobalOrder, reader: BatchReader) -> None:
    """Every field against a slow reading of the row, token by token."""
    positions = np.arange(40, 72)
    read = reader.read(positions)
    batch = read.unpack()
    labels_BT = batch.next_tokens()
    source, row = order.rows(positions)
    assert read.samples_B.tolist() == positions.tolist()
    assert read.source_B.tolist() == source.tolist()
    bounds, padding, lengths = [0], 0, []
    for b in range(32):
        at = 0
        segments = dataset.segments("train", int(source[b]), int(row[b]))
        for number, segment in enumerate(segments):
            span = slice(at, at + segment.length)
            tokens = batch.tokens_BT[b, span]
            assert batch.segments_BT[b, span].tolist() == [number] * segment.length
            assert batch.positions_BT[b, span].tolist() == list(range(segment.length))
            assert labels_BT[b, span].tolist() == [*tokens[1:].tolist(), -100]
            at += segment.length
            lengths.append(segment.length)
            bounds.append(b * 32 + at)
        assert set(batch.segments_BT[b, at:].tolist()) <= {-1}
        assert set(batch.tokens_BT[b, at:].tolist()) <= {0}
        assert set(labels_BT[b, at:].tolist()) <= {-100}
        if at < 32:
            bounds.append(b * 32 + 32)
            padding += 32 - at
    assert batch.cu_seqlens.tolist() == bounds
    assert (read.rows, read.real_tokens, int((batch.segments_BT < 0).sum())) == (32, 1024 - padding, padding)
    assert read.pairs == sum(length**2 for length in lengths)
    wanted = {"tokens_BT": torch.int64, "segments_BT": torch.int32, "cu_seqlens": torch.int32}
    assert {name: getattr(batch, name).dtype for name in wanted} == wanted


def test_ids_of_all_16_bits_reach_the_device_as_they_are(tmp_path: Path, writer: Callable[..., Any]) -> None:
    ids = np.array([65_535, 11, 32_768, 32_767, 65_535], dtype=np.uint16)
    writer(tmp_path, {"en": {"train": [ids], "eval": [ids]}})
    batch = eval_reader(TokenDataset(tmp_path), 0).read(np.array([0])).unpack()
    assert batch.tokens_BT[0, :7].tolist() == [2, 65_535, 11, 32_768, 32_767, 65_535, 3]
    assert batch.next_tokens()[0, :7].tolist() == [65_535, 11, 32_768, 32_767, 65_535, 3, -100]


def test_micro_batches_are_the_batches_of_their_rows(reader: BatchReader) -> None:
    whole = reader.read(np.arange(12)).micro_batches(4)
    for n, part in enumerate(whole):
        alone = reader.read(np.arange(4 * n, 4 * n + 4))
        for name, value in vars(alone).items():
            same = torch.equal(value, getattr(part, name)) if isinstance(value, torch.Tensor) else True
            assert same, name
    with pytest.raises(ValueError, match="micro-batches of 5"):
        reader.read(np.arange(12)).micro_batches(5)


def test_ranks_read_their_slices_of_one_batch(dataset_dir: Path, order: GlobalOrder, reader: BatchReader) -> None:
    whole = reader.read(np.arange(24))
    for world in (2, 3, 4):
        parts = [BatchReader(TokenDataset(dataset_dir), order).read(part) for part in np.split(np.arange(24), world)]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), whole.tokens_BT)


def test_evaluation_reads_every_held_out_row_once(dataset: TokenDataset) -> None:
    held_out = eval_reader(dataset, 1)
    rows = dataset.rows(1, "eval")
    batches = [held_out.read(np.array([row])) for row in range(rows)]
    tokens = torch.cat([batch.unpack().tokens_BT for batch in batches])
    stored = dataset.read("eval", np.ones(rows, dtype=np.int64), np.arange(rows)).tokens_RT
    assert np.array_equal(tokens.numpy(), stored)
    assert all(set(batch.source_B.tolist()) == {1} for batch in batches)


def test_prefetching_changes_nothing(reader: BatchReader) -> None:
    wanted = [np.arange(start, start + 8) for start in range(0, 80, 8)]
    before = threading.active_count()
    with prefetch(reader.read, iter(wanted), depth=3) as batches:
        got = [batch.samples_B.tolist() for batch in batches]
    assert got == [positions.tolist() for positions in wanted]
    assert threading.active_count() == before


def test_an_error_in_the_thread_reaches_the_consumer(reader: BatchReader) -> None:
    def positions() -> Iterator[np.ndarray]:
        yield np.arange(4)
        raise DataError("the disk went away")

    with prefetch(reader.read, positions()) as batches:
        assert next(batches).samples_B.tolist() == [0, 1, 2, 3]
        with pytest.raises(DataError, match="the disk went away"):
            next(batches)
        with pytest.raises(StopIteration):
            next(batches)


def test_leaving_early_stops_the_thread_and_reads_no_further(reader: BatchReader) -> None:
    asked = []

    def endless() -> Iterator[np.ndarray]:
        while True:
            asked.append(len(asked))
            yield np.arange(4)

    before = threading.active_count()
    with prefetch(reader.read, endless(), depth=2) as batches:
        next(batches)
    assert threading.active_count() == before
    assert len(asked) <= 5


def test_a_prefetcher_that_may_read_nothing_is_refused(reader: BatchReader) -> None:
    with pytest.raises(AssertionError, match="with 0 batches ahead"):
        prefetch(reader.read, iter([np.arange(4)]), depth=0)
