from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import data_prep.tokenizing.sample as tokenizer_sample
from data_prep.corpora import Document, ReadCounts
from data_prep.tokenizing.sample import TrainingSample, choose_places, parse_weights, spread_documents
from data_prep.tokenizing.tokenizer import train_tokenizer
from data_prep.units import make_plan
from rxt_dist.config.corpus import BuildConfig, SourceConfig
from rxt_dist.errors import ConfigError, DataError


def documents(counts: dict[str, int], size: int = 10) -> list[Document]:
    """`size` bytes each, languages in turn."""
    most = max(counts.values())
    return [Document("x" * size, name, f"src-{name}", "") for n in range(most) for name in counts if n < counts[name]]


def test_without_weights_every_language_gives_the_same() -> None:
    sample = TrainingSample(max_bytes=100)
    assert len(list(sample.take(documents({"en": 50, "pl": 30, "de": 5})))) == 25
    assert sample.taken == {"en": 100, "pl": 100, "de": 50}


def test_weights_are_shares_and_the_rest_is_left_out() -> None:
    sample = TrainingSample({"en": 0.8, "pl": 0.2}, max_bytes=400)
    stream = iter(documents({"en": 500, "pl": 500, "de": 500}))
    assert len(list(sample.take(stream))) == 50
    assert sample.taken == {"en": 400, "pl": 100}
    # It stopped when both had given their share, and did not read on to the end.
    assert len(list(stream)) > 1000


def test_a_long_document_is_cut_where_the_share_ends() -> None:
    sample = TrainingSample(max_bytes=101)
    assert list(sample.take([Document("ż" * 10_000, "pl", "pl", "")])) == ["ż" * 50]
    assert sample.taken == {"pl": 101}


def test_sources_are_weighed_too() -> None:
    sample = TrainingSample({"src-en": 1, "src-pl": 3}, "source", max_bytes=300)
    list(sample.take(documents({"en": 100, "pl": 100})))
    assert sample.taken == {"src-en": 100, "src-pl": 300}


def test_a_weight_without_text_is_an_error() -> None:
    with pytest.raises(DataError, match=r"language fr, but no text of it was found; there was en, pl"):
        train_tokenizer(documents({"en": 3, "pl": 3}), 300, TrainingSample({"en": 1, "pl": 1, "fr": 1}))


def test_weights_on_the_command_line() -> None:
    assert parse_weights(["en=0.7", "pl=3"], ["web"]) == ({"en": 0.7, "pl": 3.0}, "language")
    assert parse_weights(["web=1", "books=2"], ["web", "books", "code"]) == ({"web": 1.0, "books": 2.0}, "source")
    assert parse_weights([], ["web"]) == ({}, "language")
    for given_, message in (
        (["en"], "'en'"),
        (["en=0"], "positive"),
        (["en=inf"], "positive"),
        (["=1"], "'=1'"),
        (["en=1", "en=2"], "twice"),
        (["web=1", "bokos=2"], "bokos, which is none. Did you mean 'books'"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_weights(given_, ["web", "books"])


# ---------------------------------------------------------------------------------------------------------------------
# From all over the corpus
# ---------------------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 10**9), min_size=1, max_size=300), wanted=st.integers(1, 10**10))
def test_chosen_places_give_what_is_wanted(sizes: list[int], wanted: int) -> None:
    places = choose_places(sizes, wanted)
    assert len({index for index, _ in places}) == len(places)
    given_ = sum(min(sizes[index], most) for index, most in places)
    assert given_ >= min(wanted, sum(sizes))
    if sum(sizes) > wanted:
        # Little more than that: the least that a place gives is 1 MB.
        assert given_ <= wanted + len(places) * ((1 << 20) + 1)
    else:
        assert len(places) == len(sizes)


def test_many_places_are_spread_evenly() -> None:
    places = choose_places([10**9] * 1000, 64 << 20)
    assert len(places) == 64
    assert [index for index, _ in places][:3] == [0, 15, 31]
    # Where these are too small, more are chosen.
    assert len(choose_places([10**5] * 1000, 64 << 20)) == 1000 > len(choose_places([10**6] * 1000, 64 << 20)) > 64


def _corpus(folder: Path) -> BuildConfig:
    sources = []
    for name, language in (("web", "en"), ("wiki", "pl")):
        (folder / name).mkdir(parents=True)
        for file in range(4):
            lines = [json.dumps({"text": f"{name} {file} {n} " + "x" * 80}) for n in range(100)]
            (folder / name / f"{file}.jsonl").write_text("\n".join(lines))
        sources.append(SourceConfig(name=name, inputs=(str(folder / name),), language=language))
    return BuildConfig(sources=tuple(sources))


def test_documents_come_from_every_file_and_source_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = make_plan(_corpus(tmp_path)).units
    monkeypatch.setattr(tokenizer_sample, "_MIN_PLACE_BYTES", 1)
    counts = ReadCounts()
    sample = TrainingSample(max_bytes=4000)
    found = list(spread_documents(units, sample, counts))
    assert {document.source for document in found[:2]} == {"web", "wiki"}
    for source in ("web", "wiki"):
        texts = [document.text.split() for document in found if document.source == source]
        assert {text[1] for text in texts} == {"0", "1", "2", "3"}
        assert 4000 <= sum(len(" ".join(text)) for text in texts) <= 6000
    assert counts.documents < 200
    # Only what has a weight is read at all.
    only = list(spread_documents(units, TrainingSample({"wiki": 1.0}, "source"), ReadCounts()))
    assert {document.source for document in only} == {"wiki"}
    assert len(only) == 400
