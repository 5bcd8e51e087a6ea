from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from rxt_dist.data.manifest import DatasetManifest, load_manifest, tokenizer_fingerprint
from rxt_dist.errors import DataError


def _tokenizer_json(merges: object) -> str:
    model = {"type": "BPE", "vocab": {"a": 11, "b": 12, "ab": 13}, "merges": merges}
    return json.dumps({"model": model, "pre_tokenizer": None, "normalizer": None, "added_tokens": [], "version": "1"})


def test_the_fingerprint_sees_content_and_not_spelling() -> None:
    base = tokenizer_fingerprint(_tokenizer_json([["a", "b"]]))
    assert tokenizer_fingerprint(_tokenizer_json(["a b"])) == base
    assert tokenizer_fingerprint(_tokenizer_json([["b", "a"]])) != base


def test_a_manifest_survives_json(dataset_dir: Path) -> None:
    manifest = load_manifest(dataset_dir)
    again = DatasetManifest.from_dict(json.loads(json.dumps(manifest.to_dict())))
    assert again == manifest
    assert again.root_digest == manifest.root_digest
    assert dataclasses.replace(manifest, seq_len=64).root_digest != manifest.root_digest


def test_manifests_that_cannot_be_trusted_are_refused(dataset_dir: Path) -> None:
    path = dataset_dir / "dataset.json"
    value = json.loads(path.read_text())
    with pytest.raises(DataError, match="not a dataset"):
        load_manifest(dataset_dir / "en")
    path.write_text(json.dumps(value | {"version": 2}))
    with pytest.raises(DataError, match="version 2"):
        load_manifest(dataset_dir)
    path.write_text(json.dumps(value | {"seq_len": 64}))
    with pytest.raises(DataError, match="root digest"):
        load_manifest(dataset_dir)
    path.write_text(json.dumps(value)[:-50])
    with pytest.raises(DataError, match="cannot be read"):
        load_manifest(dataset_dir)
    path.unlink()
    (dataset_dir / "units").mkdir()
    with pytest.raises(DataError, match="has not finished"):
        load_manifest(dataset_dir)
