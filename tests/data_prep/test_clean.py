from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_prep.cleaning.shingles as shingles_module
from data_prep.cleaning.clean import (
    REASONS,
    Cleaner,
    CleanReport,
    filters_of,
    is_other_language,
    letter_share,
    line_repetition,
    ngram_repetition,
)
from data_prep.cleaning.shingles import hash_shingles, hash_words
from data_prep.corpora import Document
from data_prep.synthetic import story
from rxt_dist.config.clean import CleanConfig

ALL_ON = CleanConfig(
    normalise="nfc",
    check_language=True,
    min_characters=20,
    max_characters=5000,
    max_line_repetition=0.3,
    max_ngram_repetition=0.3,
    min_letters=0.5,
)


def document(text: str, language: str = "en", name: str = "d") -> Document:
    return Document(text, language, language, name)


def stories(count: int, language: str) -> list[str]:
    rng = random.Random(7)
    return [story(rng, language) for _ in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# Hashes of words
# ---------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(st.text(alphabet="ab żł\n\t.", max_size=30), max_size=8))
def test_words_hash_alike_exactly_where_they_are_equal(texts: list[str]) -> None:
    hashes, bounds = hash_words(texts)
    expected = [text.split() for text in texts]
    assert np.diff(bounds).tolist() == [len(words) for words in expected]
    seen: dict[str, int] = {}
    for word, value in zip([word for words in expected for word in words], hashes.tolist(), strict=True):
        assert seen.setdefault(word, value) == value
    assert len(set(seen.values())) == len(seen)


def test_hashes_never_change() -> None:
    """Surveys of other jobs and other days are compared with these."""
    hashes, _ = hash_words(["ala ma kota"])
    assert [hex(value) for value in hashes.tolist()] == HASHES
    assert [hex(value) for value in hash_shingles(hashes, 2).tolist()] == RUNS


HASHES = ["0x77e1a17daa97a40a", "0x75573edcd1c70b58", "0xaefc6e8bee904b54"]
RUNS = ["0xfe327ba3b8749778", "0x8d10e3a44c13413d"]


def test_long_texts_hash_like_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(1)
    text = " ".join(rng.choice(["ala", "ma", "żółtego", "kota\n", "x"]) for _ in range(500))
    whole, _ = hash_words([text])
    runs = hash_shingles(whole, 5)
    monkeypatch.setattr(shingles_module, "_PIECE", 64)
    cut, bounds = hash_words([text, "ala", text])
    assert bounds.tolist() == [0, 500, 501, 1001]
    assert cut.tolist() == [*whole.tolist(), whole[text.split().index("ala")], *whole.tolist()]
    assert hash_shingles(whole, 5).tolist() == runs.tolist()


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def test_repeated_lines_count_from_their_second_occurrence() -> None:
    assert line_repetition("a\nb\n\n\nc") == 0
    assert line_repetition("menu\nmenu\n  menu \n\n") == pytest.approx(2 / 3)
    assert line_repetition("abcdef\nab\nab") == pytest.approx(2 / 10)


def test_repeated_ngrams_cover_the_words_of_later_runs() -> None:
    ten = " ".join(f"w{n}" for n in range(10))
    other = " ".join(f"v{n}" for n in range(10))
    assert ngram_repetition(f"{ten} {other}") == 0
    assert ngram_repetition(f"{ten} {other} {ten}") == pytest.approx(1 / 3)
    assert ngram_repetition("la " * 100) == pytest.approx(0.99)
    assert ngram_repetition("too short to repeat") == 0


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from("abc"), max_size=60))
def test_repeated_ngrams_agree_with_counting_them_one_by_one(words: list[str]) -> None:
    covered, seen = set(), set()
    for start in range(len(words) - 9):
        run = tuple(words[start : start + 10])
        if run in seen:
            covered |= set(range(start, start + 10))
        seen.add(run)
    assert ngram_repetition(" ".join(words)) == pytest.approx(len(covered) / max(len(words), 1))


def test_letters_of_both_languages_and_their_marks_are_letters() -> None:
    assert letter_share("zażółć gęślą jaźń") == 1
    assert letter_share(unicodedata.normalize("NFD", "zażółć gęślą jaźń")) == 1
    assert letter_share("ab 12\n..") == pytest.approx(1 / 3)
    assert letter_share("   \n") == 0


def test_only_the_clearly_other_language_of_the_two_is_noticed() -> None:
    for language, other in (("en", "pl"), ("pl", "en")):
        own = stories(20, language)
        assert not any(is_other_language(text, language) for text in own)
        assert all(is_other_language(text, other) for text in own)
        # A parallel text, a third language and a tag that is neither are left alone.
        assert not is_other_language(own[0][:600] + "\n" + stories(1, other)[0][:600], language)
        assert not is_other_language("le chat est sur la table et les enfants sont dans le jardin " * 9, language)
        assert not is_other_language(own[0], "de")
        assert not is_other_language("for i in range(10): print(i)\n" * 2, language)


# ---------------------------------------------------------------------------------------------------------------------
# Cleaning
# ---------------------------------------------------------------------------------------------------------------------


def test_everything_off_keeps_the_very_document() -> None:
    given = document("x")
    cleaner = Cleaner(CleanConfig())
    assert cleaner.clean(given) is given
    assert filters_of(CleanConfig()) == []


FAILING = {
    "too_short": "Short.",
    "too_long": "".join(chr(97 + n % 26) for n in range(6000)),
    "few_letters": "1234 5678 90 + 11 = 22 33 44, 55",
    "repeated_lines": "\n".join(["Home page of the club"] * 2 + ["Welcome"]),
    "repeated_ngrams": "one two three four five six seven eight nine ten eleven " * 4,
    "wrong_language": stories(1, "pl")[0],
}


@pytest.mark.parametrize("reason", FAILING)
def test_each_filter_names_itself(reason: str) -> None:
    assert Cleaner(ALL_ON).clean(document(FAILING[reason])) == reason
    others = [name for name, fails in filters_of(ALL_ON) if name != reason and fails(document(FAILING[reason]))]
    assert others == []


def test_filters_stand_in_the_documented_order_and_the_first_names_the_reason() -> None:
    names = [name for name, _ in filters_of(ALL_ON)]
    assert names == [reason for reason in REASONS if reason in names]
    assert len(names) == 6
    assert Cleaner(ALL_ON).clean(document("1\n1\n1")) == "too_short"
    # Filters come before duplicates.
    assert Cleaner(ALL_ON).clean(document("1"), "exact_duplicate") == "too_short"
    assert Cleaner(ALL_ON).clean(document(stories(1, "en")[0]), "exact_duplicate") == "exact_duplicate"


def test_normalisation_comes_first_and_is_counted() -> None:
    decomposed = unicodedata.normalize("NFD", "Zażółć gęślą jaźń, powiedziała Łucja.")
    cleaner = Cleaner(CleanConfig(normalise="nfc", max_characters=40))
    cleaned = cleaner.clean(document(decomposed))
    assert isinstance(cleaned, Document)
    assert cleaned.text == unicodedata.normalize("NFC", decomposed) != decomposed
    assert cleaner.clean(document("plain")) == document("plain")
    assert cleaner.report.source("en").normalised == 1
    compatible = Cleaner(CleanConfig(normalise="nfkc")).clean(document("ﬁve ①"))
    assert isinstance(compatible, Document)
    assert compatible.text == "five 1"


def test_a_very_long_document_is_measured_by_its_beginning() -> None:
    tail = stories(1, "en")[0] + "1234567890" * 200_000
    assert letter_share(tail) < 0.1
    assert letter_share("word " * 300_000 + tail) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Report
# ---------------------------------------------------------------------------------------------------------------------


def _report(texts: list[str], source: str) -> CleanReport:
    cleaner = Cleaner(CleanConfig(min_characters=5))
    for number, text in enumerate(texts):
        cleaner.clean(Document(text, "en", source, f"{source}{number}"))
    return cleaner.report


def test_counts_and_samples_are_kept_by_source_and_reason() -> None:
    report = _report(["long enough", "no", "x" * 1000, "a", "b", "c"], "web")
    web = report.source("web")
    assert (web.documents, web.kept, web.dropped) == (6, 2, {"too_short": 4})
    assert (web.characters, web.kept_characters) == (1016, 1011)
    assert [sample["id"] for sample in web.samples["too_short"]] == ["web1", "web3", "web4"]
    assert [len(sample["text"]) for sample in web.samples["kept"]] == [11, 300]


def test_reports_of_units_add_up_to_the_report_of_the_whole() -> None:
    texts = ["long enough", "no", "another one", "a", "b", "c", "d", "the last one", "and one more", "more still"]
    whole = _report(texts, "web")
    whole.add(_report(["x"], "books"))
    for cut in (1, 4, 9):
        merged = CleanReport()
        for part in (_report(texts[:cut], "web"), _report(texts[cut:], "web"), _report(["x"], "books")):
            merged.add(CleanReport.from_dict(json.loads(json.dumps(part.to_dict()))))
        for report in (merged, whole):
            for samples in report.source("web").samples.values():
                for sample in samples:
                    sample.pop("id", None)
        assert merged.to_dict() == whole.to_dict()
    assert whole.to_dict()["dropped"] == {"too_short": 6}
    assert whole.documents == 11


def test_adding_shares_nothing_with_what_was_added() -> None:
    part = _report(["no"], "web")
    before = json.dumps(part.to_dict())
    total = CleanReport()
    total.add(part)
    total.add(part)
    assert json.dumps(part.to_dict()) == before
    assert total.dropped == {"too_short": 2}
