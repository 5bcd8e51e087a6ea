"""A flipped bit anywhere in what training reads is found before the row is used; other rows come unharmed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rxt_dist.data.dataset import TokenDataset
from rxt_dist.data.manifest import RecordBatchInfo, ShardInfo, load_manifest, sums_file
from rxt_dist.errors import DataError

SEQ_LEN = 32


def shard_of(root: Path) -> ShardInfo:
    return load_manifest(root).sources[0].train.shards[0]


def read_all(root: Path, rows: int) -> list[tuple[bytes, list[int]] | None]:
    """Each row's tokens and segment lengths; None where reading it was refused."""
    dataset = TokenDataset(root)
    found: list[tuple[bytes, list[int]] | None] = []
    for row in range(rows):
        try:
            raw = dataset.read("train", np.array([0]), np.array([row]))
            found.append((raw.tokens_RT.tobytes(), raw.seg_len_I.tolist()))
        except DataError:
            found.append(None)
    return found


def buffers(batch: RecordBatchInfo, segments: int) -> dict[str, tuple[int, int]]:
    """First byte and length of every buffer that a row is read from."""
    return {
        "tokens": (batch.tokens, 2 * SEQ_LEN * batch.rows),
        "list offsets": (batch.seg_len_offsets, 8 * (batch.rows + 1)),
        "segment lengths": (batch.seg_len, 2 * segments),
    }


@pytest.mark.parametrize("buffer", ["tokens", "list offsets", "segment lengths"])
@pytest.mark.slow
def test_any_bit_of_a_row_is_found(dataset_dir: Path, buffer: str) -> None:
    shard = shard_of(dataset_dir)
    path = dataset_dir / shard.file
    sound, content = read_all(dataset_dir, shard.rows), path.read_bytes()
    assert None not in sound
    segments = sum(len(row[1]) for row in sound if row)
    start, length = buffers(shard.batches[0], segments)[buffer]
    rng = np.random.default_rng(3)
    places = [0, length - 1, *rng.integers(0, length, 60).tolist()]
    for place in places:
        damaged = bytearray(content)
        damaged[start + place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        found = read_all(dataset_dir, shard.rows)
        refused = [row for row, value in enumerate(found) if value is None]
        # An offset is the end of one row and the start of the next.
        assert 1 <= len(refused) <= (2 if buffer == "list offsets" else 1)
        assert all(value == sound[row] for row, value in enumerate(found) if value is not None)
        if buffer == "tokens":
            assert refused == [place // (2 * SEQ_LEN)]


def test_any_bit_of_the_checksums_is_found_when_the_shard_is_opened(dataset_dir: Path) -> None:
    path = dataset_dir / sums_file(shard_of(dataset_dir).file)
    content = path.read_bytes()
    for bit in np.random.default_rng(4).integers(0, 8 * len(content), 100).tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"{path.name} does not have the content .*--repair"):
            TokenDataset(dataset_dir).read("train", np.array([0]), np.array([0]))


def test_a_bit_that_flips_while_the_dataset_is_open_is_found(dataset_dir: Path) -> None:
    shard = shard_of(dataset_dir)
    dataset = TokenDataset(dataset_dir)
    zero, row = np.array([0]), np.array([7])
    dataset.read("train", zero, row)
    with open(dataset_dir / shard.file, "r+b") as file:
        file.seek(shard.batches[0].tokens + 7 * 2 * SEQ_LEN + 5)
        file.write(b"\xff")
    with pytest.raises(DataError, match="Row 7 of shard"):
        dataset.read("train", zero, row)
