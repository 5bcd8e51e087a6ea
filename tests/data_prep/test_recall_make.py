"""The maker of recall dialogues: distances are what they say, values cannot be guessed, what is held out stays out."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.recall.kinds import draw, fact
from data_prep.recall.make import SPEECHES, RecallRequest, dialogues, parts, write_recall
from rxt_dist.errors import ConfigError, DataError

LANGUAGES = sorted(SPEECHES)
PLACEHOLDER = re.compile(r"\{v(?:\[[^]]*\])?\}")


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_sentence_of_every_kind_holds_its_value_once(language: str) -> None:
    """Each template with each slot, and each value with some: no form is missing, no answer says its value twice."""
    speech, rng = SPEECHES[language], random.Random(0)
    for kind in speech.kinds:
        assert all(len(PLACEHOLDER.findall(told)) == 1 for told in kind.tells), kind.name
        assert all(len(PLACEHOLDER.findall(answer)) == 1 and "{v" not in asked for asked, answer in kind.asks)
        for slot in kind.slots:
            for value in kind.values:
                if kind.same_gender and value.gender != slot.gender:
                    continue
                made = fact(kind, slot, value, speech, rng)
                assert made.answer.count(made.value) == 1, made
                assert made.value not in made.asked, made
                for sentence in (made.told, made.reply, made.asked, made.answer):
                    assert not re.search(r"[{}]|  | [.,?]", sentence), sentence
                    assert sentence[0] == sentence[0].upper(), sentence
                    assert sentence[-1] in ".?", sentence


def test_english_articles_fit_the_words_after_them() -> None:
    rng = random.Random(3)
    for kind in SPEECHES["en"].kinds:
        for slot in kind.slots:
            for value in kind.values[:12]:
                for told in kind.tells:
                    made = fact(replace(kind, tells=(told,)), slot, value, SPEECHES["en"], rng)
                    wrong = r"\ba (?!ukulele)[aeiou]|\ban [^aeiou]"
                    assert not re.search(wrong, f"{made.told} {made.answer}"), made


def test_polish_days_are_in_the_case_of_their_question() -> None:
    rng = random.Random(4)
    asked = {query for query, _ in (filler(rng) for _ in range(100) for filler in SPEECHES["pl"].fillers)}
    assert {query for query in asked if "dzień jest" in query} == {
        f"Jaki dzień jest po {day}?"
        for day in ("poniedziałku", "wtorku", "środzie", "czwartku", "piątku", "sobocie", "niedzieli")
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_values_are_many_and_none_is_part_of_another(language: str) -> None:
    for kind in SPEECHES[language].kinds:
        names = [str(value) for value in kind.values]
        assert len(set(names)) == len(names) >= 34, kind.name
        assert not [(a, b) for a in names for b in names if a != b and a in b], kind.name
        assert all(form.strip() == form and form for value in kind.values for form in value.forms.values())


@pytest.mark.parametrize("language", LANGUAGES)
def test_other_talk_never_says_a_value(language: str) -> None:
    """Else a value that is held out would be trained on, or another one could be taken for what was told."""
    speech, rng = SPEECHES[language], random.Random(1)
    forms = {form.lower() for kind in speech.kinds for value in kind.values for form in value.forms.values()}
    forms -= {"a", "an"}
    for filler in speech.fillers:
        for _ in range(300):
            words = re.findall(r"\w+", " ".join(filler(rng)).lower())
            assert not forms & set(words), words


@pytest.mark.parametrize("variety", ["small", "full"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_file_of_a_distance_asks_that_far_and_no_farther(language: str, variety: str) -> None:
    request = RecallRequest(languages=(language,), distances=(1, 2, 5), held_out_distances=(9,), variety=variety)
    seen: dict[int, Counter[int]] = {}
    for part in parts(request):
        distances = seen.setdefault(part.distance, Counter())
        for record in dialogues(request, part, 150):
            turns = record["interactions"]
            assert len(turns) <= request.longest
            far = [(turn, item["recall"]) for turn, item in enumerate(turns) if "recall" in item]
            assert max(recall["distance"] for _, recall in far) == part.distance
            told = [turns[turn - recall["distance"]] for turn, recall in far]
            assert len({item["query"] for item in told}) == len(far) <= request.facts
            assert not any("recall" in item for item in told)
            assert all(turns[turn]["answer"].count(recall["value"]) == 1 for turn, recall in far)
            assert len({item["query"] for _, item in enumerate(turns) if "recall" in item}) == len(far)
            distances.update(recall["distance"] for _, recall in far)
    assert seen[1].keys() == {1}
    assert seen[5].keys() == {1, 2, 3, 4, 5}


def test_facts_of_a_dialogue_cannot_be_taken_for_each_other() -> None:
    """Two of one kind have another slot, and no two the same value."""
    rng = random.Random(2)
    several = 0
    for _ in range(300):
        drawn = draw(SPEECHES["en"], 4, rng)
        assert len({one.value for one in drawn}) == 4
        kinds = Counter(one.kind for one in drawn)
        several += max(kinds.values()) > 1
        assert len({(one.kind, one.told.replace(one.value, "")) for one in drawn}) == 4
    assert several


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_brother_has_the_name_of_a_man_and_a_sister_that_of_a_woman(language: str) -> None:
    (kind,) = (kind for kind in SPEECHES[language].kinds if kind.name == "relative")
    gender = {str(value): value.gender for value in kind.values}
    slots = {str(slot): slot.gender for slot in kind.slots}
    rng, seen = random.Random(4), set()
    speech = replace(SPEECHES[language], kinds=(replace(kind, tells=kind.tells[:1], asks=kind.asks[:1]),))
    for _ in range(100):
        for one in draw(speech, 2, rng):
            slot = next(name for name in slots if f" {name} " in one.answer)
            assert gender[one.value] == slots[slot], one
            seen.add(slots[slot])
    assert seen == {0, 1}


def test_a_question_alone_does_not_decide_its_answer() -> None:
    request = RecallRequest(languages=("pl",), distances=(2,), held_out_distances=(), variety="small")
    answers: dict[str, Counter[str]] = {}
    for record in dialogues(request, parts(request)[0], 4000):
        for item in record["interactions"]:
            if "recall" in item:
                answers.setdefault(item["query"], Counter())[item["recall"]["value"]] += 1
    assert len(answers) == 10  # name and home; four kinds of two slots each
    for question, values in answers.items():
        assert 25 <= len(values) <= 28, question
        assert max(values.values()) / values.total() < 0.08, question


@pytest.mark.parametrize("language", ["en", "pl"])
def test_no_more_values_than_wanted_of_which_some_are_held_out(language: str) -> None:
    request = RecallRequest(languages=(language,), distances=(2,), held_out_distances=(), variety="small", values=8)
    training, held_out = parts(request)
    seen: dict[str, dict[bool, set[str]]] = {}
    for part in (training, held_out):
        for record in dialogues(request, part, 600):
            for item in record["interactions"]:
                if "recall" in item:
                    values = seen.setdefault(item["query"], {True: set(), False: set()})
                    values[part.held_out].add(item["recall"]["value"])
    assert len(seen) == 10
    for question, values in seen.items():
        assert values[True], question
        assert values[False], question
        assert not values[True] & values[False], question
        assert len(values[True] | values[False]) == 8, question


def _texts(out: Path, part: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for path in sorted(out.glob(part)))


def test_held_out_values_and_distances_stand_in_no_training_file(tmp_path: Path) -> None:
    request = RecallRequest(distances=(1, 3), held_out_distances=(6,), count=400, held_out_count=200, seed=3)
    files = write_recall(tmp_path / "out", request)
    assert {part.file for part, _ in files} == {
        *(f"{tag}-d{distance}.jsonl" for tag in ("en", "pl") for distance in (1, 3)),
        *(f"held-out/{tag}-d{distance}-values.jsonl" for tag in ("en", "pl") for distance in (1, 3)),
        *(f"held-out/{tag}-d6.jsonl" for tag in ("en", "pl")),
    }
    trained = re.findall(r'"value": "([^"]*)"', _texts(tmp_path / "out", "*.jsonl"))
    unseen = re.findall(r'"value": "([^"]*)"', _texts(tmp_path / "out", "held-out/*-values.jsonl"))
    far = re.findall(r'"value": "([^"]*)"', _texts(tmp_path / "out", "held-out/*-d6.jsonl"))
    assert not set(trained) & set(unseen)
    assert not set(far) & set(unseen)
    words = set(re.findall(r"\w+", _texts(tmp_path / "out", "*.jsonl")))
    assert not [value for value in set(unseen) if value in words], "told, or answered with, in training"
    tags = [json.loads(line) for line in _texts(tmp_path / "out", "held-out/*.jsonl").splitlines() if line]
    assert all(record["held_out"] is True for record in tags)
    assert all(record["text"] is None for record in tags)
    assert not any("held_out" in line for line in _texts(tmp_path / "out", "*.jsonl").splitlines())


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_form_of_a_held_out_value_is_one_of_a_trained_value(language: str) -> None:
    """Lists are apart: a name that one kind holds out is not trained on by another."""
    trained, unseen = (
        {form for kind in SPEECHES[language].with_values(0.1, held_out).kinds for value in kind.values
         for case, form in value.forms.items() if case != "a"}
        for held_out in (False, True)
    )  # fmt: skip
    assert not trained & unseen


def test_other_seeds_hold_out_the_same_values() -> None:
    for held_out in (False, True):
        one, other = (SPEECHES["pl"].with_values(0.1, held_out) for _ in range(2))
        assert [kind.values for kind in one.kinds] == [kind.values for kind in other.kinds]
    cities = {kind.name: {str(value) for value in kind.values} for kind in SPEECHES["pl"].with_values(0.1, True).kinds}
    assert cities["home"] == cities["work"] == cities["holiday"]
    assert 3 <= len(cities["home"]) <= 5


def test_the_same_request_gives_the_same_bytes_and_more_of_it_begins_alike(tmp_path: Path) -> None:
    few = {"languages": ("en",), "distances": (2,), "held_out_distances": (), "held_out_values": 0.0}
    for name, options in (("a", {"count": 30}), ("b", {"count": 30}), ("c", {"count": 50}), ("d", {"seed": 1})):
        write_recall(tmp_path / name, RecallRequest(**few, **{"count": 30, **options}))
    a, b, c, d = ((tmp_path / name / "en-d2.jsonl").read_text() for name in "abcd")
    assert a == b
    assert c.startswith(a)
    assert not set(a.splitlines()) & set(d.splitlines())


def test_a_repeated_call_makes_what_is_missing_and_another_request_is_refused(tmp_path: Path) -> None:
    request = RecallRequest(languages=("en",), distances=(1, 2), held_out_distances=(), count=20, held_out_count=5)
    write_recall(tmp_path / "whole", request)
    write_recall(tmp_path / "out", request)
    (tmp_path / "out/en-d2.jsonl").unlink()
    kept = (tmp_path / "out/en-d1.jsonl").stat().st_mtime_ns
    write_recall(tmp_path / "out", request)
    assert (tmp_path / "out/en-d1.jsonl").stat().st_mtime_ns == kept
    assert (tmp_path / "out/en-d2.jsonl").read_bytes() == (tmp_path / "whole/en-d2.jsonl").read_bytes()
    with pytest.raises(DataError, match=r"of another request \(other count, seed\)"):
        write_recall(tmp_path / "out", RecallRequest(**{**vars(request), "seed": 1, "count": 21}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("Dear")
    with pytest.raises(DataError, match="already exists and holds no dialogues"):
        write_recall(tmp_path / "mine", request)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_name_of_its_own() -> None:
    """So that near dialogues and far ones stand in one dataset as sources of their own."""
    found = parts(RecallRequest(languages=("pl",), distances=(2,), held_out_distances=(3,), name="near"))
    assert [part.source for part in found] == ["near-d2", "near-d2-values", "near-d3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": ("de",)}, "--languages has 'de'; known are en, pl"),
        ({"languages": ()}, "--languages and --distances name at least one each"),
        ({"distances": ()}, "--languages and --distances name at least one each"),
        ({"distances": (0, 2)}, "A distance is 0; it is at least 1"),
        ({"distances": (2, 12)}, "name each once; a distance is trained or held out"),
        ({"turns": 16}, "--turns is 16, but what is asked for 16 turns later needs 17 turns"),
        ({"held_out_values": 0.6}, "--held-out-values is 0.6; it is a share from 0 to 0.5"),
        ({"name": "Near by"}, "--name is 'Near by'; sources are called by small letters, digits and _"),
        ({"variety": "huge"}, "--variety is 'huge'; known are small, full"),
        ({"values": 3}, "--values is 3; at least 4"),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RecallRequest(**options)  # type: ignore[arg-type]
