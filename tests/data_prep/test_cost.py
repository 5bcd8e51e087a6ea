from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep.corpora import Document
from data_prep.documents.cost import Assumptions, SourceCost, estimate, measure
from data_prep.tokenizing.tokenizer import save_tokenizer, train_tokenizer
from rxt_dist.config.run import DataConfig
from rxt_dist.errors import ConfigError, DataError


def described(seq_len: int | None = 100, **build: Any) -> DataConfig:
    values = {"path": "out", "seq_len": seq_len, "build": build}
    return DataConfig.model_validate_json(json.dumps(values, default=str))


def test_published_sizes_by_hand_count() -> None:
    data = described(
        unit_mb=1,
        eval_fraction=0.1,
        sources=[
            {"name": "a", "inputs": ["nowhere/a"], "language": "en", "documents": 1000, "text_gb": 0.0045},
            {"name": "b", "dataset": "nobody/b", "text_gb": 0.002},
        ],
    )
    cost = estimate(data, Assumptions(rate=2.0, bytes_per_token={"en": 4.5}), tasks=3)
    first, second = cost.sources
    assert first == SourceCost(
        name="a",
        language="en",
        origin="published",
        text_bytes=4_500_000,
        documents=1000,
        tokens=1_002_000,  # 4.5 bytes a token, and two control tokens a document
        rows=10_041,  # 0.2 % of padding
        train_rows=10_041 - 1004,
        units=5,
        shards=10,  # of training and evaluation in each unit
        disk_bytes=10_041 * (200 + 32) + 1000 * 10,
        core_hours=1_002_000 / 2e6 / 3600,
    )
    assert (second.tokens, second.language, second.units) == (500_000, "und", 2)
    assert (cost.total.tokens, cost.total.units, cost.total.name) == (1_502_000, 7, "all")
    # u00000 to u00006 fall to the tasks by hash; no task has fewer than a third of the seven rounded up.
    assert 3 <= cost.largest_task_units <= 7
    assert cost.hours(1) == pytest.approx(cost.largest_task_units * cost.total.core_hours / 7)
    assert cost.hours(100) == pytest.approx(cost.total.core_hours / 7)


def test_a_large_unit_has_several_shards() -> None:
    data = described(
        unit_mb=10, eval_fraction=0, sources=[{"name": "a", "inputs": ["nowhere"], "language": "en", "text_gb": 0.1}]
    )
    (source,) = estimate(data, Assumptions(1.0, {"en": 1.0})).sources
    assert (source.units, source.rows, source.shards) == (10, 1_002_000, 16)


def test_inputs_that_are_there_are_looked_into(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = [f"text {n:04} " + "word " * 98 for n in range(1000)]  # 500 bytes each
    pq.write_table(pa.table({"text": texts}), folder / "a.en.parquet", row_group_size=100, use_dictionary=False)
    (folder / "b.en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = described(
        unit_mb=0.1,
        sources=[
            {"name": "here", "inputs": [folder], "text_gb": 0.01, "documents": 7},
            {"name": "there", "inputs": [tmp_path / "other"], "language": "pl", "text_gb": 0.001, "documents": 9},
        ],
    )
    cost = estimate(data, Assumptions(1.0))
    here, there = cost.sources
    assert (here.origin, here.language, there.origin, there.documents) == ("inputs", "en", "published", 9)
    assert here.text_bytes == pytest.approx(1_000_000, rel=0.05)
    assert here.documents == pytest.approx(2000, rel=0.05)
    assert here.tokens == pytest.approx(1_000_000 / 4.5 + 4000, rel=0.05)
    assert 8 <= here.units <= 10
    assert there.units == 10
    assert cost.total.origin == "both"
    (note,) = cost.notes
    assert "'here' hold about 0.0 GB of text, but 0.0 GB are published" in note


def test_what_cannot_be_told(tmp_path: Path) -> None:
    source = {"name": "a", "inputs": [tmp_path / "nowhere"]}
    with pytest.raises(DataError, match="nowhere does not exist"):
        estimate(described(sources=[source]), Assumptions(1.0))
    with pytest.raises(ConfigError, match="no seq_len"):
        estimate(described(seq_len=None, sources=[source]), Assumptions(1.0))
    with pytest.raises(ConfigError, match=r"no build\.sources"):
        estimate(described(), Assumptions(1.0))
    with pytest.raises(ConfigError, match=r"build\.tokenizer to encode with"):
        measure([tmp_path], described(sources=[source]))


def test_a_trial_measures_rate_and_bytes_per_token(tmp_path: Path) -> None:
    texts = [f"The story of number {n} and of the {n % 13} bears that they have met." for n in range(3000)]
    documents = [Document(text, "en", "en", str(n)) for n, text in enumerate(texts)]
    save_tokenizer(train_tokenizer(documents, 600), tmp_path / "t.json")
    (tmp_path / "x.en.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = described(
        tokenizer=tmp_path / "t.json",
        backend="tokenizers",
        sources=[{"name": "a", "inputs": ["nowhere"], "text_gb": 1}],
        clean={"exact_duplicates": True, "min_characters": 1},
    )
    trial = measure([tmp_path / "x.en.jsonl"], data)
    assert trial.text_bytes == sum(len(text) for text in texts)
    assert trial.backend == "tokenizers"
    assert trial.rate == pytest.approx(trial.tokens / trial.seconds / 1e6)
    assert trial.bytes_per_token["en"] == pytest.approx(trial.text_bytes / (trial.tokens - 2 * 3000))
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="no usable document"):
        measure([tmp_path / "empty.jsonl"], data)
