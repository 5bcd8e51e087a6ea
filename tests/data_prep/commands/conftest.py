"""A small corpus, and a data file over it with a source for each language and a filter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_verbs import as_json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpus")
    as_json("sample", root / "text", "--megabytes", 0.4)
    return root


@pytest.fixture(scope="module")
def data_file(corpus: Path) -> Path:
    sources = [
        {"name": "stories-en", "inputs": [f"{corpus}/text/en"], "language": "en"},
        {"name": "stories-pl", "inputs": [f"{corpus}/text/pl"], "language": "pl"},
    ]
    build = {"sources": sources, "vocab_size": 700, "clean": {"min_characters": 400}}
    path = corpus / "data.yaml"
    path.write_text(json.dumps({"path": str(corpus / "shards"), "build": build}))
    return path
