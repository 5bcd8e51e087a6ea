from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.corpora import Document
from data_prep.synthetic import story
from data_prep.tokenizing.report import fit_report, gather
from data_prep.tokenizing.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.data.rows import SPECIAL_TOKENS
from rxt_dist.errors import ConfigError, DataError


def _documents(count: int = 60) -> list[Document]:
    rng = random.Random(0)
    return [Document(story(rng, lang), lang, lang, str(n)) for n in range(count) for lang in ("en", "pl")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(_documents(), 700)


def test_control_tokens_stand_at_their_ids_and_sizes_fit(tokenizer: Tokenizer) -> None:
    assert {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS} == SPECIAL_TOKENS
    assert tokenizer.get_vocab_size() == 700


def test_training_is_deterministic(tokenizer: Tokenizer) -> None:
    assert train_tokenizer(_documents(), 700).to_str() == tokenizer.to_str()


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert min(ids, default=11) >= 11


@pytest.mark.parametrize("literal", SPECIAL_TOKENS)
def test_text_cannot_spell_a_control_token(tokenizer: Tokenizer, tmp_path: Path, literal: str) -> None:
    save_tokenizer(tokenizer, tmp_path / "t.json")
    text = f"List{literal} {literal}x {literal}"
    for one in (tokenizer, load_tokenizer(tmp_path / "t.json")):
        ids = one.encode(text, add_special_tokens=False).ids
        assert min(ids) >= 11
        assert one.decode(ids, skip_special_tokens=False) == text


def test_saving_and_loading_keeps_the_fingerprint(tokenizer: Tokenizer, tmp_path: Path) -> None:
    sha256 = save_tokenizer(tokenizer, tmp_path / "t.json")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "t.json").to_str()) == sha256


def test_the_report_counts_per_language(tokenizer: Tokenizer) -> None:
    english, polish = fit_report(tokenizer, gather(_documents(5)))
    assert (english.language, polish.language) == ("en", "pl")
    assert english.documents == 5
    assert english.round_trip_failures == polish.round_trip_failures == 0
    assert 1 < english.to_dict()["tokens_per_word"] < 6
    assert 1 < polish.to_dict()["bytes_per_token"] < 8


def test_sizes_and_empty_corpora_are_refused() -> None:
    for size in (266, 65_537):
        with pytest.raises(ConfigError, match=str(size)):
            train_tokenizer(_documents(1), size)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([], 300)


def test_tokenizers_that_cannot_be_trusted_are_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    path = tmp_path / "t.json"
    path.write_text("{}")
    with pytest.raises(DataError, match="not a tokenizer"):
        load_tokenizer(path)
    content = json.loads(tokenizer.to_str())
    lowercase = content | {"normalizer": {"type": "Lowercase"}}
    path.write_text(json.dumps(lowercase))
    with pytest.raises(DataError, match="does not give back"):
        load_tokenizer(path)
    renamed = json.loads(tokenizer.to_str().replace("[MASK]", "[MSK]"))
    path.write_text(json.dumps(renamed))
    with pytest.raises(DataError, match="control tokens at their ids"):
        load_tokenizer(path)
    gap = json.loads(tokenizer.to_str())
    last = max(gap["model"]["vocab"], key=gap["model"]["vocab"].get)
    for shifted, message in ((800, "without gaps"), (65_536, "ids up to 65536")):
        gap["model"]["vocab"][last] = shifted
        path.write_text(json.dumps(gap))
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)
    literal = Tokenizer.from_str(tokenizer.to_str())
    literal.encode_special_tokens = False
    with pytest.raises(DataError, match="ordinary text into control tokens"):
        check_tokenizer(literal, "this one")


def test_what_a_file_says_of_cutting_and_filling_is_not_done(tokenizer: Tokenizer, tmp_path: Path) -> None:
    stated = Tokenizer.from_str(tokenizer.to_str())
    stated.enable_truncation(8)
    stated.enable_padding(length=500)
    stated.save(str(tmp_path / "t.json"))
    texts = ["One story after another, and none is cut. " * 5, "short"]
    loaded = load_tokenizer(tmp_path / "t.json")
    for expected, found in zip(tokenizer.encode_batch(texts), loaded.encode_batch(texts), strict=True):
        assert found.ids == expected.ids
    with pytest.raises(AssertionError, match="cuts or fills"):
        check_tokenizer(stated, "this one")


def test_chance_in_encoding_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    content = json.loads(tokenizer.to_str())
    for dropout in (None, 0.0, 0.1):
        content["model"]["dropout"] = dropout
        (tmp_path / "t.json").write_text(json.dumps(content))
        if not dropout:
            load_tokenizer(tmp_path / "t.json")
            continue
        with pytest.raises(DataError, match=r"at random \(dropout 0\.1\).* Set dropout to null"):
            load_tokenizer(tmp_path / "t.json")
