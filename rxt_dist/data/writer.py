"""The shards of a dataset: Arrow files of packed rows, each with a file of row checksums beside it.

A shard is an uncompressed Arrow IPC file of rows of exactly `seq_len` tokens, so any Arrow reader opens it. Training
does not read it through Arrow: the manifest holds the byte offset of every buffer, and a row is a slice of the file.
Arrow has no checksums, so each shard has a file of them beside it: little-endian uint64 [rows], xxh3_64 over a row's
token bytes followed by the bytes of its segment lengths. A reader checks what it reads, when it reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from rxt_dist.data.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    SHARD_SUFFIX,
    RecordBatchInfo,
    ShardInfo,
    canonical_json,
    sums_file,
)
from rxt_dist.data.rows import (
    BOUNDARY_POLICY,
    MAX_SEQ_LEN,
    MAX_VOCABULARY,
    SPECIAL_COUNT,
    SPECIAL_TOKENS,
    PackedRows,
    check_rows,
    row_sums,
)
from rxt_dist.errors import ConfigError
from rxt_dist.files import blake3_file, fsync_dir, temporary_path

RECORD_BATCH_ROWS = 4096
SHARD_ROWS = 65_536


@dataclass(frozen=True)
class ShardSpec:
    """What all shards of a dataset have in common; it stands in the metadata of every shard's schema."""

    seq_len: int
    vocab_size: int
    tokenizer_sha256: str
    packing_version: int
    spec_hash: str
    boundaries: str = BOUNDARY_POLICY

    def __post_init__(self) -> None:
        if not 2 <= self.seq_len <= MAX_SEQ_LEN:
            raise ConfigError(f"The row length is {self.seq_len}; it must be from 2 to {MAX_SEQ_LEN} tokens.")
        if not SPECIAL_COUNT < self.vocab_size <= MAX_VOCABULARY:
            raise ConfigError(
                f"The vocabulary has {self.vocab_size} ids; shards hold 16-bit ids, so at most {MAX_VOCABULARY} fit. "
                f"Train a tokenizer with a smaller --vocab-size."
            )

    def schema(self) -> pa.Schema:
        """The Arrow schema of data format version 1."""
        metadata = {
            "rxt.format": FORMAT_NAME,
            "rxt.version": str(FORMAT_VERSION),
            "rxt.seq_len": str(self.seq_len),
            "rxt.dtype": "uint16",
            "rxt.tokenizer_sha256": self.tokenizer_sha256,
            "rxt.special_tokens": canonical_json(SPECIAL_TOKENS),
            "rxt.boundaries": self.boundaries,
            "rxt.packing_version": str(self.packing_version),
            "rxt.spec_hash": self.spec_hash,
        }
        fields = [
            pa.field("tokens", pa.list_(pa.uint16(), self.seq_len), nullable=False),
            pa.field("seg_len", pa.large_list(pa.uint16()), nullable=False),
            pa.field("seg_doc", pa.large_list(pa.uint32()), nullable=False),
            pa.field("seg_off", pa.large_list(pa.uint32()), nullable=False),
        ]
        return pa.schema(fields, metadata=metadata)


class ShardWriter:
    """Writes the rows of one source, split and unit as `<stem>-000.arrow`, `<stem>-001.arrow`, ...

    A shard and its row checksums appear under their names only whole: written to temporary files, synced, hashed,
    renamed. Rows are checked (`check`) before they are written. Memory: at most one record batch of rows beyond what
    `add` is given.
    """

    def __init__(
        self,
        root: Path,
        directory: str,
        stem: str,
        spec: ShardSpec,
        check: Callable[[PackedRows, int], None] = check_rows,
    ) -> None:
        self._root, self._directory, self._stem, self._spec, self._check = root, directory, stem, spec, check
        self._schema = spec.schema()
        # One record batch of rows, filled in place; the system gives memory only to what is touched.
        self._tokens_RT = np.empty((RECORD_BATCH_ROWS, spec.seq_len), dtype=np.uint16)
        self._held_rows = 0
        self._segments: list[tuple[npt.NDArray[Any], ...]] = []  # seg_count_R, seg_len_I, seg_doc_I, seg_off_I
        self._shards: list[ShardInfo] = []
        self._file: pa.OSFile | None = None
        self._writer: pa.ipc.RecordBatchFileWriter | None = None
        self._shard_rows = 0
        self._sums: list[npt.NDArray[np.uint64]] = []
        self._first_document = 0

    def add(self, rows: PackedRows) -> None:
        """Take R rows; whole record batches are written at once."""
        self._check(rows, self._spec.vocab_size)
        at = 0
        while at < rows.rows:
            part = rows.slice(at, min(at + RECORD_BATCH_ROWS - self._held_rows, rows.rows))
            self._tokens_RT[self._held_rows : self._held_rows + part.rows] = part.tokens_RT
            self._segments.append((part.seg_count_R, part.seg_len_I, part.seg_doc_I, part.seg_off_I))
            self._held_rows += part.rows
            at += part.rows
            if self._held_rows == RECORD_BATCH_ROWS:
                self._write_batch()

    def finish(self) -> tuple[ShardInfo, ...]:
        """Write what is left, commit the last shard and return all of them in row order."""
        if self._held_rows:
            self._write_batch()
        if self._writer is not None:
            self._commit()
        return tuple(self._shards)

    def _write_batch(self) -> None:
        columns = [np.concatenate(column) for column in zip(*self._segments, strict=True)]
        self._write(PackedRows(self._tokens_RT[: self._held_rows], *columns))
        self._held_rows, self._segments = 0, []

    def _write(self, rows: PackedRows) -> None:
        if self._writer is None:
            self._final.parent.mkdir(parents=True, exist_ok=True)
            self._file = pa.OSFile(str(temporary_path(self._final)), "wb")
            self._writer = pa.ipc.new_file(self._file, self._schema)
            self._first_document = int(rows.seg_doc_I[: int(rows.seg_count_R[0])].min())
        bounds = pa.array(np.concatenate(([0], np.cumsum(rows.seg_count_R))), pa.int64())
        tokens = pa.FixedSizeListArray.from_arrays(pa.array(rows.tokens_RT.reshape(-1)), self._spec.seq_len)
        lists = [
            pa.LargeListArray.from_arrays(bounds, pa.array(values))
            for values in (rows.seg_len_I, rows.seg_doc_I, rows.seg_off_I)
        ]
        self._writer.write_batch(pa.record_batch([tokens, *lists], schema=self._schema))
        self._sums.append(row_sums(rows))
        self._shard_rows += rows.rows
        if self._shard_rows == SHARD_ROWS:
            self._commit()

    @property
    def _name(self) -> str:
        return f"{self._directory}/{self._stem}-{len(self._shards):03d}{SHARD_SUFFIX}"

    @property
    def _final(self) -> Path:
        return self._root / self._name

    def _commit(self) -> None:
        assert self._writer is not None
        assert self._file is not None
        self._writer.close()
        self._file.close()
        shard, sums = self._final, self._root / sums_file(self._name)
        temporary_path(sums).write_bytes(np.concatenate(self._sums).tobytes())
        for path in (shard, sums):
            with open(temporary_path(path), "rb") as file:
                os.fsync(file.fileno())
        info = ShardInfo(
            file=self._name,
            rows=self._shard_rows,
            bytes=temporary_path(shard).stat().st_size,
            blake3=blake3_file(temporary_path(shard)),
            row_sums_blake3=blake3_file(temporary_path(sums)),
            first_document=self._first_document,
            batches=record_batch_offsets(temporary_path(shard)),
        )
        # The shard last: where it stands, its checksums stand.
        for path in (sums, shard):
            os.replace(temporary_path(path), path)
        fsync_dir(shard.parent)
        self._shards.append(info)
        self._writer, self._file, self._shard_rows, self._sums = None, None, 0, []


def record_batch_offsets(path: Path) -> tuple[RecordBatchInfo, ...]:
    """The byte offsets of every record batch's buffers in an Arrow file, from the addresses in a memory map of it."""
    whole = pa.memory_map(str(path)).read_buffer()
    reader = pa.ipc.open_file(pa.BufferReader(whole))
    found = []
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        offsets = [batch.column(0).flatten().buffers()[1].address - whole.address]
        for column in range(1, 4):
            _, list_offsets, _, values = batch.column(column).buffers()
            offsets += [list_offsets.address - whole.address, values.address - whole.address]
        found.append(RecordBatchInfo(batch.num_rows, *offsets))
    return tuple(found)
