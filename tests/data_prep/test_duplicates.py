from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_prep.cleaning.duplicates as duplicates
import data_prep.cleaning.survey as survey
from data_prep.cleaning.duplicates import decide, dropped, survey_unit
from data_prep.cleaning.survey import bands_and_rows, minhash, open_survey, shingles, survey_path
from data_prep.corpora import ReadCounts, read_unit
from data_prep.units import Unit, make_plan
from rxt_dist.config.clean import CleanConfig, NearDuplicateConfig
from rxt_dist.config.corpus import BuildConfig
from rxt_dist.errors import ConfigError, DataError

EXACT = CleanConfig(exact_duplicates=True)
NEAR = NearDuplicateConfig(threshold=0.7, permutations=128, shingle_words=3)
BOTH = CleanConfig(exact_duplicates=True, near_duplicates=NEAR)


def text_of(rng: random.Random, words: int = 120) -> str:
    return " ".join(f"w{rng.randrange(5000)}" for _ in range(words))


def changed(text: str, rng: random.Random, count: int) -> str:
    """The text with `count` neighbouring words replaced: the runs of 3 that stay are all but count + 2."""
    words = text.split()
    start = rng.randrange(len(words) - count)
    words[start : start + count] = [f"new{rng.randrange(10**9)}" for _ in range(count)]
    return " ".join(words)


def plan(folder: Path, files: dict[str, list[str]]) -> list[Unit]:
    """One unit a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in files.items():
        lines = [json.dumps({"text": text, "language": "en", "id": str(n)}) for n, text in enumerate(texts)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return units_of(folder)


def units_of(folder: Path) -> list[Unit]:
    slices = [part for unit in make_plan(BuildConfig(), [folder]).units for part in unit.slices]
    return [Unit(f"u{number}", (part,), part.text_bytes) for number, part in enumerate(slices)]


def result(out: Path, units: list[Unit]) -> dict[str, dict[int, str]]:
    return {unit.name: dropped(out, unit) for unit in units}


def run(out: Path, units: list[Unit], config: CleanConfig) -> dict[str, Any]:
    for unit in units:
        survey_unit(out, unit, config)
    return decide(out, units, config)


@pytest.fixture(scope="module")
def corpus(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[Unit], set[tuple[int, int]], set[tuple[int, int]]]:
    """Four units with the places (unit, ordinal) of planted exact and near-duplicates of earlier texts."""
    rng = random.Random(3)
    files: list[list[str]] = [[], [], [], []]
    originals: list[str] = []
    exact, near = set(), set()
    for _ in range(400):
        unit = rng.randrange(4)
        files[unit].append(text_of(rng))
    originals = list(files[0])
    for number, text in enumerate(originals[:40]):
        unit = 1 + number % 3
        (exact if number % 2 else near).add((unit, len(files[unit])))
        files[unit].append(text if number % 2 else changed(text, rng, 6))
    folder = tmp_path_factory.mktemp("corpus")
    return folder, plan(folder, {f"f{n}": texts for n, texts in enumerate(files)}), exact, near


def test_planted_duplicates_are_found_and_nothing_else(tmp_path: Path, corpus: Any) -> None:
    _, units, exact, near = corpus
    report = run(tmp_path, units, BOTH)
    found = {(n, o): reason for n, unit in enumerate(units) for o, reason in dropped(tmp_path, unit).items()}
    assert {place for place, reason in found.items() if reason == "exact_duplicate"} == exact
    assert {place for place, reason in found.items() if reason == "near_duplicate"} == near
    assert report["documents"] == 440
    assert (report["exact_duplicate"], report["near_duplicate"], report["clusters"]) == (20, 20, 40)
    assert report["largest_cluster"] == 2
    assert report["sources"] == {"en": {"documents": 440, "exact_duplicate": 20, "near_duplicate": 20}}


def test_samples_show_both_texts(tmp_path: Path, corpus: Any) -> None:
    _, units, _, _ = corpus
    samples = run(tmp_path, units, BOTH)["samples"]
    assert [sample["reason"] for sample in samples] == ["exact_duplicate"] * 5 + ["near_duplicate"] * 5
    texts = {unit.name: [document.text for document in read_unit(unit, ReadCounts())] for unit in units}
    for sample in samples:
        for role in ("kept", "dropped"):
            place = sample[role]
            assert texts[place["unit"]][place["ordinal"]].startswith(place["text"])
        assert (sample["similarity"] == 1) == (sample["reason"] == "exact_duplicate")
        assert sample["similarity"] >= 0.7


def test_exact_alone_needs_no_signatures(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, units, exact, _ = corpus
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    report = run(tmp_path, units, EXACT)
    assert {(n, o) for n, unit in enumerate(units) for o in dropped(tmp_path, unit)} == exact
    assert "similarity" not in report["samples"][0]
    with pytest.raises(ConfigError, match="pip install 'rensa"):
        survey_unit(tmp_path, units[0], BOTH)


def test_the_order_of_surveys_and_the_partitions_change_nothing(
    tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, units, _, _ = corpus
    one, two = tmp_path / "one", tmp_path / "two"
    report = run(one, units, BOTH)
    for unit in reversed(units):
        survey_unit(two, unit, BOTH)
    for path in sorted((one / "duplicates").glob("*.survey")):
        assert (two / "duplicates" / path.name).read_bytes() == path.read_bytes()
    monkeypatch.setattr(duplicates, "_PARTITION_DOCUMENTS", 37)
    monkeypatch.setattr(duplicates, "_COMPARE_AT_ONCE", 3)
    assert decide(two, units, BOTH) == report
    for path in sorted((one / "duplicates").glob("*.npy")):
        assert (two / "duplicates" / path.name).read_bytes() == path.read_bytes()


def test_surveys_do_not_depend_on_how_documents_are_grouped(
    tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, units, _, _ = corpus
    survey_unit(tmp_path / "a", units[0], BOTH)
    monkeypatch.setattr(survey, "_GROUP_BYTES", 1)
    monkeypatch.setattr(survey, "_BAND_DOCUMENTS", 7)
    survey_unit(tmp_path / "b", units[0], BOTH)
    name = units[0].name
    assert survey_path(tmp_path / "a", name).read_bytes() == survey_path(tmp_path / "b", name).read_bytes()


def test_finished_surveys_are_kept_and_stale_ones_are_not(tmp_path: Path, corpus: Any) -> None:
    folder, units, _, _ = corpus
    survey_unit(tmp_path, units[0], EXACT)
    path = survey_path(tmp_path, units[0].name)
    before = path.stat().st_mtime_ns
    survey_unit(tmp_path, units[0], EXACT)
    assert path.stat().st_mtime_ns == before
    for other in (CleanConfig(exact_duplicates=True, min_letters=0.1), BOTH):
        assert open_survey(tmp_path, units[0], other) is None
    # A file that was cut off, and one with another input.
    path.write_bytes(path.read_bytes()[:-100])
    assert open_survey(tmp_path, units[0], EXACT) is None
    survey_unit(tmp_path, units[0], EXACT)
    assert open_survey(tmp_path, units[0], EXACT) is not None
    shutil.copytree(folder, tmp_path / "corpus")
    with open(tmp_path / "corpus" / "f0.jsonl", "a") as file:
        file.write('{"text": "one more", "language": "en"}\n')
    moved = units_of(tmp_path / "corpus")[0]
    assert open_survey(tmp_path, moved, EXACT) is None


def test_progress_counts_all_text_that_is_read(tmp_path: Path) -> None:
    units = plan(tmp_path / "in", {"a": ["żółw", "x" * 300_000, "a dog", "żaba"]})
    told: list[int] = []
    survey_unit(tmp_path, units[0], CleanConfig(exact_duplicates=True, max_characters=100), told.append)
    assert told == [300_007, 10]


def test_a_survey_that_fails_leaves_nothing(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, units, _, _ = corpus
    calls = iter([None, OSError(28, "No space left on device")])

    def failing(*arguments: Any) -> Any:
        if error := next(calls):
            raise error
        return minhash(*arguments)

    monkeypatch.setattr(survey, "_GROUP_BYTES", 1)
    monkeypatch.setattr(survey, "minhash", failing)
    with pytest.raises(OSError, match="No space"):
        survey_unit(tmp_path, units[0], BOTH)
    assert list((tmp_path / "duplicates").iterdir()) == []


def test_deciding_twice_reads_the_first_decision(tmp_path: Path, corpus: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, units, _, _ = corpus
    report = run(tmp_path, units, BOTH)
    with monkeypatch.context() as patch:
        patch.setattr(duplicates, "_find_exact", None)
        assert decide(tmp_path, units, BOTH) == report
    before = result(tmp_path, units)
    (tmp_path / "duplicates" / f"{units[2].name}.dropped.npy").unlink()
    with pytest.raises(DataError, match="have not been decided"):
        dropped(tmp_path, units[2])
    assert decide(tmp_path, units, BOTH) == report
    assert result(tmp_path, units) == before


def test_a_missing_survey_is_named(tmp_path: Path, corpus: Any) -> None:
    _, units, _, _ = corpus
    for unit in units[:-1]:
        survey_unit(tmp_path, unit, EXACT)
    with pytest.raises(DataError, match=f"1 of 4 units.*{units[-1].name}"):
        decide(tmp_path, units, EXACT)


def test_what_the_filters_drop_is_no_ones_first(tmp_path: Path) -> None:
    rng = random.Random(5)
    text = text_of(rng)
    units = plan(tmp_path / "in", {"a": ["too short", text, "too short"], "b": ["too short", text]})
    config = CleanConfig(exact_duplicates=True, min_characters=20)
    run(tmp_path, units, config)
    assert result(tmp_path, units) == {units[0].name: {}, units[1].name: {1: "exact_duplicate"}}


def test_normalised_texts_are_compared(tmp_path: Path) -> None:
    units = plan(tmp_path / "in", {"a": ["zażółć gęślą", "zaz\u0307o\u0301łc\u0301 ge\u0328s\u0301la\u0328"]})
    run(tmp_path / "as is", units, EXACT)
    assert dropped(tmp_path / "as is", units[0]) == {}
    run(tmp_path / "nfc", units, CleanConfig(exact_duplicates=True, normalise="nfc"))
    assert dropped(tmp_path / "nfc", units[0]) == {1: "exact_duplicate"}


def test_units_without_documents_and_texts_without_words(tmp_path: Path) -> None:
    units = plan(tmp_path / "in", {"a": ["x"], "b": ["one two", "One  TWO", "\u200b", "\u200d", "one three"]})
    config = BOTH.model_copy(update={"min_characters": 0, "max_characters": 8})
    run(tmp_path / "out", units, config)
    assert dropped(tmp_path / "out", units[1]) == {1: "near_duplicate"}
    nothing = config.model_copy(update={"max_characters": None, "min_characters": 100})
    assert run(tmp_path / "none", units, nothing)["documents"] == 0
    assert result(tmp_path / "none", units) == {unit.name: {} for unit in units}


def kept_and_dropped(units: list[Unit], out: Path) -> tuple[list[str], list[str]]:
    """The texts of both kinds, in their order."""
    kept, gone = [], []
    for unit in units:
        reasons = dropped(out, unit)
        for ordinal, document in enumerate(read_unit(unit, ReadCounts())):
            (gone if ordinal in reasons else kept).append(document.text)
    return kept, gone


def greedy(texts: list[str], config: NearDuplicateConfig) -> list[str]:
    """What is kept of a few texts, said as simply as can be."""
    kept: list[str] = []
    signatures: list[Any] = []
    for text, signature in zip(texts, minhash(texts, config), strict=True):
        if not any((signature == other).mean() >= config.threshold for other in signatures):
            kept.append(text)
            signatures.append(signature)
    return kept


def test_a_chain_of_similar_texts_loses_only_what_is_like_a_kept_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(21)
    words = [f"w{rng.randrange(10**6)}" for _ in range(200 + 5 * 300)]
    texts = [" ".join(words[5 * n : 5 * n + 200]) for n in range(300)]
    units = plan(tmp_path / "in", {"a": texts[100:200], "b": texts[:100], "c": texts[200:]})
    in_order = texts[100:200] + texts[:100] + texts[200:]
    report = run(tmp_path / "out", units, BOTH)
    kept, gone = kept_and_dropped(units, tmp_path / "out")
    assert kept == greedy(in_order, NEAR)
    # A seventh of a text is another one: of 1,700 words so many texts are needed at least.
    assert len(kept) > 25
    assert report["near_duplicate"] == len(gone) == 300 - len(kept) > 200
    assert 2 <= report["largest_cluster"] < 20
    assert report["clusters"] <= len(kept)
    assert all(sample["similarity"] >= NEAR.threshold for sample in report["samples"])
    monkeypatch.setattr(duplicates, "_PARTITION_DOCUMENTS", 50)
    monkeypatch.setattr(duplicates, "_COMPARE_AT_ONCE", 7)
    again = tmp_path / "again"
    assert run(again, units, BOTH) == report
    assert result(again, units) == result(tmp_path / "out", units)


def test_many_clusters_are_settled_at_once_and_each_by_itself(tmp_path: Path) -> None:
    rng = random.Random(22)
    texts = []
    for _ in range(30):
        chain = [text_of(rng, 150)]
        for _ in range(rng.randrange(6)):
            chain.append(changed(chain[-1], rng, rng.randrange(1, 25)))
        texts += chain
    rng.shuffle(texts)
    units = plan(tmp_path / "in", {"a": texts[::2], "b": texts[1::2]})
    run(tmp_path, units, CleanConfig(near_duplicates=NEAR))
    kept, gone = kept_and_dropped(units, tmp_path)
    signatures = minhash(kept, NEAR)
    for text in gone:
        assert ((minhash([text], NEAR) == signatures).mean(axis=1) >= NEAR.threshold).any()
    # What no band brings together is not compared, so a few more than need be may stay.
    assert 0 <= len(kept) - len(greedy(texts[::2] + texts[1::2], NEAR)) <= 3


def test_a_huge_cluster_costs_a_bounded_number_of_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(23)
    words = [f"w{rng.randrange(10**6)}" for _ in range(1700)]
    texts = [" ".join(words[5 * n : 5 * n + 200]) for n in range(300)]
    units = plan(tmp_path / "in", {"a": texts})
    monkeypatch.setattr(duplicates, "_CLUSTER_COMPARISONS", 1)
    monkeypatch.setattr(duplicates, "_LEADERS", 3)
    run(tmp_path, units, BOTH)
    kept, gone = kept_and_dropped(units, tmp_path)
    first = greedy(texts, NEAR)[:3]
    like_the_first = [text for text in texts if text in first or len(greedy([*first, text], NEAR)) == 3]
    assert gone == [text for text in like_the_first if text not in first]
    assert len(kept) == 300 - len(gone) > 250


def test_a_text_that_occurs_very_often_is_no_trouble(tmp_path: Path) -> None:
    rng = random.Random(12)
    text = text_of(rng)
    units = plan(tmp_path / "in", {"a": [changed(text, rng, 2) for _ in range(1500)]})
    config = CleanConfig(near_duplicates=NEAR)
    report = run(tmp_path, units, config)
    assert report["near_duplicate"] == 1499


def test_equal_halves_of_a_hash_are_not_equal_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Colliding:
        """Texts of one length share the first 64 bits."""

        def __init__(self, data: bytes) -> None:
            self._digest = bytes([len(data)]) * 8 + data[:8].ljust(8)

        def digest(self) -> bytes:
            return self._digest

    monkeypatch.setattr(survey, "blake3", Colliding)
    units = plan(tmp_path / "in", {"a": ["one", "two", "one", "six"], "b": ["two", "four"]})
    run(tmp_path, units, EXACT)
    assert result(tmp_path, units) == {units[0].name: {2: "exact_duplicate"}, units[1].name: {0: "exact_duplicate"}}


# ---------------------------------------------------------------------------------------------------------------------
# MinHash
# ---------------------------------------------------------------------------------------------------------------------


def test_signatures_never_change() -> None:
    """Pinned: a release of the library that changes them must raise the survey's version."""
    assert minhash(["Ala ma kota, a kot ma Alę.", "x"], NEAR)[:, :4].tolist() == SIGNATURES


SIGNATURES = [[19005, 5059, 53990, 17949], [51786, 16668, 51782, 8712]]


def test_signatures_estimate_the_similarity() -> None:
    rng = random.Random(2)
    errors = []
    for _ in range(60):
        text = text_of(rng)
        other = changed(text, rng, rng.randrange(1, 100))
        one, two = minhash([text, other], NEAR)
        values, bounds = shingles([text, other], 3)
        sets = [set(values[bounds[n] : bounds[n + 1]].tolist()) for n in range(2)]
        errors.append(float((one == two).mean()) - len(sets[0] & sets[1]) / len(sets[0] | sets[1]))
    assert abs(np.mean(errors)) < 0.02
    assert np.std(errors) < 1.5 * 0.5 / 128**0.5


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.95])
def test_bands_find_what_is_at_the_threshold(threshold: float) -> None:
    bands, rows = bands_and_rows(NearDuplicateConfig(threshold=threshold, permutations=128))
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.9
    # One row more would miss too many: no candidate is compared for nothing.
    assert 1 - (1 - threshold ** (rows + 1)) ** (128 // (rows + 1)) < 0.9


def test_words_are_compared_in_lower_case_and_without_their_white_space() -> None:
    one, two = minhash(["A B C d e", "a  b\nc D\tE"], NEAR)
    assert (one == two).all()
