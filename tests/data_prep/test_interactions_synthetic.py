"""The synthetic dialogues: what they ask can be known from their memory alone."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_prep.corpora import find_files
from data_prep.interactions import synthetic as synthetic_interactions
from rxt_dist.errors import DataError


@pytest.mark.parametrize("language", ["en", "pl"])
def test_what_is_asked_late_was_told_early_and_cannot_be_guessed(language: str) -> None:
    rng = random.Random(5)
    answer_of: dict[tuple[str, str], str] = {}
    answers_to: dict[str, set[str]] = {}
    for _ in range(400):
        record = synthetic_interactions.dialogue(rng, language)
        turns = record["interactions"]
        assert 6 <= len(turns) <= 8
        assert len(record["facts"]) in (2, 3)
        for fact in record["facts"]:
            told, asked = turns[fact["told"]], turns[fact["asked"]]
            assert fact["asked"] - fact["told"] >= 3
            assert fact["value"] in told["query"]
            assert fact["value"] in asked["answer"]
            assert fact["value"] not in asked["query"]
            # The told sentence and the question decide the answer; the question alone does not.
            assert answer_of.setdefault((told["query"], asked["query"]), asked["answer"]) == asked["answer"]
            answers_to.setdefault(asked["query"], set()).add(asked["answer"])
    assert len(answers_to) == 5
    assert all(len(answers) >= 6 for answers in answers_to.values())


@pytest.mark.parametrize("language", ["en", "pl"])
def test_single_records_have_every_part_and_true_sums(language: str) -> None:
    rng = random.Random(6)
    records = [synthetic_interactions.single(rng, language) for _ in range(300)]
    assert {key for record in records for key in record} == {
        "query", "answer", "think", "tool_call", "tool_result", "internal",
    }  # fmt: skip
    for record in records:
        if "tool_result" in record:
            product, value = record["tool_result"].split(" = ")
            a, b = product.split(" * ")
            assert int(a) * int(b) == int(value)
            assert record["answer"].endswith(f"{value}.")
        if "think" in record:
            assert record["think"].split(" = ")[-1] == record["answer"].split(" = ")[-1]


def test_the_records_are_repeatable_and_stand_apart_from_the_texts(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic_interactions.write_interactions(tmp_path / name, 40_000, seed)
    contents = {n: {f.name: f.path.read_bytes() for f in find_files([tmp_path / n / "single"])} for n in "abc"}
    assert contents["a"] == contents["b"]
    assert contents["a"] != contents["c"]
    sizes = [path.stat().st_size for path in (tmp_path / "a").rglob("*.jsonl")]
    assert len(sizes) == 4
    assert 0.9 < sum(sizes) / 40_000 < 1.1
    with pytest.raises(DataError, match="not empty"):
        synthetic_interactions.write_interactions(tmp_path / "a", 1000)
