from __future__ import annotations

import unicodedata

import pytest
from language_samples import ENGLISH, NEITHER, POLISH

from data_prep.languages import guess_language, language_of, language_of_name, language_tag


@pytest.mark.parametrize(("language", "texts"), [("en", ENGLISH), ("pl", POLISH)])
def test_ordinary_texts_are_recognised(language: str, texts: tuple[str, ...]) -> None:
    assert len(texts) == 24
    found = {text: guess_language(text) for text in texts}
    assert set(found.values()) <= {language, "und"}, "none may be taken for the other language"
    missed = [text for text, tag in found.items() if tag == "und"]
    assert len(missed) <= 2, missed


@pytest.mark.parametrize("text", NEITHER)
def test_other_languages_and_code_are_not_claimed(text: str) -> None:
    assert guess_language(text) == "und"


def test_letters_may_be_composed_or_not() -> None:
    for text in POLISH:
        assert guess_language(unicodedata.normalize("NFD", text)) == guess_language(text)


def test_long_texts_are_judged_by_their_beginning() -> None:
    english, polish = " ".join(ENGLISH) * 5, " ".join(POLISH) * 5
    assert guess_language(english + polish) == "en"
    assert guess_language(polish + english) == "pl"
    assert guess_language(" ".join(f"{a} {b}" for a, b in zip(ENGLISH, POLISH, strict=True))) == "und"


@pytest.mark.parametrize(
    ("name", "language"),
    [
        ("texts/pl/x.txt", "pl"),
        ("texts/stories.pl.jsonl", "pl"),
        ("en/PL/x.txt", "pl"),
        ("pl/stories.en.jsonl.gz", "en"),
        ("texts/stories.jsonl", None),
        ("data/pol_Latn/000.parquet", "pl"),
        ("arxiv/cs/x.txt", None),
        ("code/ts/x.hr.txt", None),
        ("os/ml/to.jsonl", None),
    ],
)
def test_language_of_a_name(name: str, language: str | None) -> None:
    assert language_of_name(name) == language


def test_a_folder_or_file_that_is_named_a_language_counts_more_than_the_text() -> None:
    assert language_of("code/pl/x.txt", ENGLISH[0]) == "pl"
    assert language_of("pl/books/old/x.txt", ENGLISH[0]) == "pl"
    assert language_of("en/pl/x.txt", ENGLISH[0]) == "pl"
    assert language_of("code/pl/x.txt", "my $x = shift; print $x;") == "pl"
    assert language_of("texts/stories.pl.jsonl", ENGLISH[0]) == "pl"
    assert language_of("pl/stories.en.jsonl", POLISH[0]) == "en"
    assert language_of("arxiv/cs/x.txt", ENGLISH[0]) == "en"
    assert language_of("arxiv/cs/x.txt", "?") == "und"


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        *((value, "pl") for value in ("pl", "PL", "pl-PL", "pl_PL.UTF-8", "pol", "pol_Latn", "Polish", " polish ")),
        *((value, "en") for value in ("en", "en-GB", "eng", "eng_Latn", "English", "ENGLISH")),
        ("de-AT", "de"), ("deu", "deu"), ("../x", "und"), ("?", "und"),
        ("x" * 32, "x" * 32), ("x" * 33, "und"), ("units", "und"), ("Duplicates", "und"),
    ],
)  # fmt: skip
def test_tags(value: str, tag: str) -> None:
    assert language_tag(value) == tag
