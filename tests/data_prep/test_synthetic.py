from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from data_prep.corpora import ReadCounts, find_files, read_file
from data_prep.synthetic import dialogue, story, write_sample
from rxt_dist.errors import DataError


def test_a_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_sample(tmp_path / name, 60_000, seed)
    contents = {
        name: {p.relative_to(tmp_path / name): p.read_bytes() for p in (tmp_path / name).rglob("*.*")} for name in "abc"
    }
    assert contents["a"] == contents["b"]
    assert contents["a"] != contents["c"]


def test_the_corpus_is_balanced_and_of_the_size_asked(tmp_path: Path) -> None:
    write_sample(tmp_path / "s", 400_000)
    sizes = {"en": 0, "pl": 0}
    counts = ReadCounts()
    texts = []
    for file in find_files([tmp_path / "s"]):
        for document in read_file(file, counts):
            sizes[document.language] += len(document.text.encode())
            texts.append(document.text)
    assert abs(sizes["en"] / sizes["pl"] - 1) < 0.1
    assert abs(sum(sizes.values()) / 400_000 - 1) < 0.1
    stories = [text for text in texts if len(text) > 600]
    assert len(set(stories)) == len(stories)


@pytest.mark.parametrize("language", ["en", "pl"])
def test_every_template_fills_and_reads_as_sentences(language: str) -> None:
    rng = random.Random(1)
    for _ in range(400):
        text = story(rng, language)
        assert not set("{}[]/") & set(text)
        assert text[-1] in '."!?'
        assert "  " not in text
        for vowel in "aeiou":
            assert f" a {vowel}" not in text or language == "pl"


@pytest.mark.parametrize("language", ["en", "pl"])
def test_late_questions_are_answered_by_early_facts(language: str) -> None:
    rng = random.Random(2)
    for _ in range(200):
        turns = dialogue(rng, language)
        assert 5 <= len(turns) <= 8
        told = " ".join(turn["query"] + turn["answer"] for turn in turns[:2])
        questions = [turn for turn in turns if turn["query"].endswith("?")]
        last = questions[-1]["answer"].rstrip(".").split()[-1]
        early = " ".join(turn["query"] for turn in turns[:3])
        assert last.lower() in (told + early).lower()


def test_structured_records_keep_their_turns(tmp_path: Path) -> None:
    write_sample(tmp_path / "s", 60_000)
    record = json.loads((tmp_path / "s/pl/dialogues.jsonl").read_text().splitlines()[0])
    assert record["kind"] == "dialogue"
    assert all(set(turn) == {"query", "answer"} for turn in record["turns"])
    assert record["turns"][0]["query"] in record["text"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        write_sample(tmp_path, 1000)
