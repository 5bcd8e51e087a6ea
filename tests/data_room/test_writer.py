from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import xxhash

from rxt_dist.data.manifest import sums_file
from rxt_dist.data.packing import pack
from rxt_dist.data.writer import ShardSpec, ShardWriter
from rxt_dist.errors import ConfigError
from rxt_dist.files import blake3_file


def _spec(**changes: object) -> ShardSpec:
    values = {"seq_len": 16, "vocab_size": 65_536, "tokenizer_sha256": "a", "packing_version": 1, "spec_hash": "b"}
    return ShardSpec(**(values | changes))


def test_any_arrow_reader_opens_a_shard(tmp_path: Path) -> None:
    documents = [np.arange(20, 20 + n, dtype=np.uint16) for n in (3, 40, 7)]
    writer = ShardWriter(tmp_path, "en/train", "u00000", _spec())
    rows = pack(documents, [5, 6, 7], 16)
    writer.add(rows)
    (shard,) = writer.finish()
    table = pa.ipc.open_file(str(tmp_path / shard.file)).read_all()
    assert table.schema.field("tokens").type == pa.list_(pa.uint16(), 16)
    assert [table.schema.field(name).type.value_type for name in ("seg_len", "seg_doc", "seg_off")] == [
        pa.uint16(),
        pa.uint32(),
        pa.uint32(),
    ]
    assert table["tokens"].to_pylist() == rows.tokens_RT.tolist()
    assert [n for row in table["seg_doc"].to_pylist() for n in row] == rows.seg_doc_I.tolist()
    metadata = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
    assert metadata["rxt.seq_len"] == "16"
    assert json.loads(metadata["rxt.special_tokens"])["[I]"] == 10
    assert shard.blake3 == blake3_file(tmp_path / shard.file)
    assert not list(tmp_path.rglob("*.tmp.*"))


def test_shards_rotate_and_offsets_find_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxt_dist.data.writer.RECORD_BATCH_ROWS", 8)
    monkeypatch.setattr("rxt_dist.data.writer.SHARD_ROWS", 16)
    writer = ShardWriter(tmp_path, "en/train", "u00000", _spec())
    parts = [pack([np.full(14, 100 + n, dtype=np.uint16)], [n], 16) for n in range(42)]
    for part in parts:
        writer.add(part)
    shards = writer.finish()
    assert [shard.rows for shard in shards] == [16, 16, 10]
    assert [shard.first_document for shard in shards] == [0, 16, 32]
    seen = []
    for shard in shards:
        content = (tmp_path / shard.file).read_bytes()
        for batch in shard.batches:
            tokens = np.frombuffer(content, "<u2", batch.rows * 16, batch.tokens).reshape(-1, 16)
            seen += tokens[:, 1].tolist()
    assert seen == [100 + n for n in range(42)]


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        writer = ShardWriter(tmp_path / name, "en/train", "u00000", _spec())
        writer.add(pack([np.arange(11, 60, dtype=np.uint16)], [0], 16))
        hashes.append(writer.finish())
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    ("ids", "message"),
    [([11, 0, 12], "special"), ([11, 7, 12], "special"), ([2, 11, 12], "special"), ([11, 12, 900], "vocabulary")],
)
def test_rows_that_break_the_format_are_never_written(tmp_path: Path, ids: list[int], message: str) -> None:
    writer = ShardWriter(tmp_path, "en/train", "u00000", _spec(vocab_size=900))
    with pytest.raises(AssertionError, match=message):
        writer.add(pack([np.array(ids, dtype=np.uint16)], [0], 16))


@pytest.mark.parametrize("changes", [{"seq_len": 65_536}, {"seq_len": 1}, {"vocab_size": 65_537}])
def test_sizes_that_16_bits_cannot_hold_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=str(next(iter(changes.values())))):
        _spec(**changes)


def test_beside_a_shard_lie_the_checksums_of_its_rows(tmp_path: Path) -> None:
    """As anybody would compute them from the Arrow file; the manifest vouches for their file."""
    documents = [np.arange(20, 20 + n, dtype=np.uint16) for n in (3, 40, 7, 1)]
    writer = ShardWriter(tmp_path, "en/train", "u00000", _spec())
    writer.add(pack(documents, [5, 6, 7, 8], 16))
    (shard,) = writer.finish()
    table = pa.ipc.open_file(str(tmp_path / shard.file)).read_all()
    rows = zip(table["tokens"].to_pylist(), table["seg_len"].to_pylist(), strict=True)
    wanted = [xxhash.xxh3_64_intdigest(np.array(tokens + lengths, "<u2").tobytes()) for tokens, lengths in rows]
    path = tmp_path / "en/train/u00000-000.sums"
    assert np.fromfile(path, "<u8").tolist() == wanted
    assert shard.row_sums_blake3 == blake3_file(path)
    assert sums_file(shard.file) == "en/train/u00000-000.sums"


def test_a_shard_stands_only_where_its_checksums_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before any of the renames: no shard without its checksums, and no half file under its name."""
    renamed: list[str] = []

    def stop_before(count: int) -> None:
        def replace(source: Path, target: Path) -> None:
            if len(renamed) == count:
                raise KeyboardInterrupt
            renamed.append(target.name)
            source.rename(target)

        monkeypatch.setattr("rxt_dist.data.writer.os.replace", replace)

    for count, wanted in ((0, []), (1, ["u00000-000.sums"]), (2, ["u00000-000.arrow", "u00000-000.sums"])):
        stop_before(count)
        writer = ShardWriter(tmp_path / str(count), "en", "u00000", _spec())
        writer.add(pack([np.arange(11, 60, dtype=np.uint16)], [0], 16))
        with contextlib.suppress(KeyboardInterrupt):
            writer.finish()
        here = (tmp_path / str(count) / "en").iterdir()
        assert sorted(path.name for path in here if not path.name.startswith(".")) == wanted
        renamed.clear()
