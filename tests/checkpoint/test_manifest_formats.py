"""Checkpoints of versions that hashed files with sha256 are read and verified."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rxt_dist.checkpoint.store import MANIFEST, CheckpointStore

NAME = "rank-00000.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", keep=3)


def save_in_format_1(store: CheckpointStore, step: int, hashed: bool = True) -> Path:
    written = store.begin(step) / NAME
    written.write_bytes(bytes(range(256)) * step)
    folder = store.commit(step, [store.record(written)], {"tokens": step})
    body = json.loads((folder / MANIFEST).read_text())
    del body["digest"]
    body["format"] = 1
    body["files"] = [{"name": NAME, "bytes": 256 * step}]
    if hashed:
        body["files"][0]["sha256"] = hashlib.sha256((folder / NAME).read_bytes()).hexdigest()
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**body, "digest": digest}))
    return folder


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    reports: list[str] = []
    found = store.latest_valid(reports.append)
    return found and found.step, reports


def test_a_checkpoint_of_an_older_version_is_verified_by_its_sha256(store: CheckpointStore) -> None:
    save_in_format_1(store, 1)
    folder = save_in_format_1(store, 2)
    assert newest(store) == (2, [])
    content = bytearray((folder / NAME).read_bytes())
    content[100] ^= 1
    (folder / NAME).write_bytes(content)
    step, reports = newest(store)
    assert step == 1
    assert f"{NAME}: damaged" in reports[0]


def test_a_file_without_a_hash_is_not_sound(store: CheckpointStore) -> None:
    save_in_format_1(store, 1)
    save_in_format_1(store, 2, hashed=False)
    step, reports = newest(store)
    assert step == 1
    assert f"{NAME}: damaged" in reports[0]
