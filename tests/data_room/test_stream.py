"""One stream of rows, bit for bit: on any number of ranks, with any batch, after any resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.loader import BatchReader, prefetch
from rxt_dist.data.sampler import BLOCK, DataState, GlobalOrder, OrderSource, Phase, integer_weights

ROWS = 720
# (ranks, rows of a global batch): every one divides the stream's 720 rows or stops at its end.
SETTINGS = [
    (world, batch) for world in (1, 2, 3, 4, 6, 8) for batch in (1, 2, 3, 4, 6, 8, 12, 16, 24, 48) if batch % world == 0
]


def order_of(dataset: TokenDataset) -> GlobalOrder:
    """Two phases; the second begins at position 4,096, in the middle of the stream that is compared."""
    phases = [Phase(100, integer_weights([2, 1, 1])), Phase(10**6, integer_weights([1, 5, 1]))]
    return GlobalOrder(dataset.order_sources(), phases, 5, dataset.seq_len, max_epochs=10**6)


def stream(root: Path, settings: list[tuple[int, int]], change_every: int = 0) -> tuple[str, list[int]]:
    """Digest of all that is read from position 3,736 on, and the positions, with a fresh dataset on every rank."""
    digest, seen = hashlib.sha256(), []
    position, end, step = BLOCK - ROWS // 2, BLOCK + ROWS // 2, 0
    ranks = [BatchReader(data := TokenDataset(root), order_of(data)) for _ in range(max(w for w, _ in settings))]
    while position < end:
        world, batch = settings[(step // change_every if change_every else 0) % len(settings)]
        batch = min(batch, end - position) if world == 1 else batch
        share = batch // world
        for rank in range(world):
            start = position + rank * share
            read = ranks[rank].read(np.arange(start, min(start + share, end))) if start < end else None
            if read is None:
                continue
            rows = read.unpack()
            seen += read.samples_B.tolist()
            tensors = (rows.tokens_BT, rows.next_tokens(), rows.positions_BT, rows.segments_BT)
            for row in range(read.rows):
                for tensor in (*tensors, read.source_B, read.samples_B):
                    digest.update(tensor[row].numpy().tobytes())
        position, step = position + batch, step + 1
    return digest.hexdigest(), seen


@pytest.fixture
def wanted(dataset_dir: Path) -> str:
    digest, seen = stream(dataset_dir, [(1, ROWS)])
    assert seen == list(range(BLOCK - ROWS // 2, BLOCK + ROWS // 2))
    return digest


@pytest.mark.slow
def test_the_stream_is_the_same_for_every_number_of_ranks_and_every_batch(dataset_dir: Path, wanted: str) -> None:
    assert len(SETTINGS) >= 20
    assert [setting for setting in SETTINGS if stream(dataset_dir, [setting])[0] != wanted] == []


@pytest.mark.parametrize("change_every", [1, 2, 5])
@pytest.mark.slow
def test_ranks_and_batch_may_change_at_any_step(dataset_dir: Path, wanted: str, change_every: int) -> None:
    rng = np.random.default_rng(change_every)
    for _ in range(3):
        mixed = [SETTINGS[index] for index in rng.permutation(len(SETTINGS))]
        assert stream(dataset_dir, mixed, change_every)[0] == wanted


def _edges() -> list[int]:
    """Positions beside which a source ends a pass or the mixture changes, and two in between."""
    order = _big_order()
    source, _ = order.rows(np.arange(3 * BLOCK))
    ends_of_passes = [int(np.flatnonzero(source == index)[rows - 1]) + 1 for index, rows in enumerate((3000, 2500))]
    return [*ends_of_passes, BLOCK, 2 * BLOCK, 777, 2 * BLOCK + 901]


def _big_order() -> GlobalOrder:
    sources = [OrderSource("en", 3000), OrderSource("pl", 2500)]
    phases = [Phase(tokens, integer_weights(shares)) for tokens, shares in ((9, [1, 1]), (9, [1, 3]), (9**9, [3, 1]))]
    return GlobalOrder(sources, phases, 11, 1, max_epochs=10**9)


@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_three_resumes_in_a_row_at_every_edge_change_nothing(offset: int) -> None:
    """Stopped, saved, loaded and stopped again at or beside each edge; each life is a new object and other batches."""
    wanted = np.stack(_big_order().rows(np.arange(3 * BLOCK)), axis=1)
    assert len(_edges()) == 6
    for edge in _edges():
        stops = [edge + offset, edge + offset + 1, edge + offset + 5, 3 * BLOCK]
        saved = json.dumps(DataState.at(_big_order(), ["digest"], 0, 0).to_dict())
        seen = []
        for life, stop in enumerate(stops):
            order = _big_order()
            state = DataState.from_dict(json.loads(saved))
            state.check(order, ["digest"])
            for start in range(state.position, stop, 97 + life):
                seen.append(np.stack(order.rows(np.arange(start, min(start + 97 + life, stop))), axis=1))
            saved = json.dumps(DataState.at(order, ["digest"], stop, stop).to_dict())
            assert len(saved) < 1024
        assert np.array_equal(np.concatenate(seen), wanted), (edge, offset)


def test_what_was_read_ahead_and_not_delivered_comes_again(dataset_dir: Path) -> None:
    """A resume begins at what was delivered; the thread had read further."""
    order = order_of(TokenDataset(dataset_dir))

    def life(position: int, batches: int) -> list[list[int]]:
        asked: list[int] = []

        def positions() -> Iterator[np.ndarray]:
            for start in range(position, 96, 8):
                asked.append(start)
                yield np.arange(start, start + 8)

        with prefetch(BatchReader(TokenDataset(dataset_dir), order).read, positions(), depth=3) as ready:
            got = [next(ready).samples_B.tolist() for _ in range(batches)]
        assert len(asked) >= batches
        return got

    pieces = [life(0, 3), life(24, 1), life(32, 1), life(40, 7)]
    assert [sample for piece in pieces for batch in piece for sample in batch] == list(range(96))
