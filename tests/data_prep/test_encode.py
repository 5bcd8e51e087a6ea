from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.building import encode
from data_prep.building.encode import (
    TokenizersBackend,
    choose_backend,
    chunks,
    first_difference,
    open_backend,
    probe_texts,
)
from data_prep.corpora import Document
from data_prep.synthetic import write_sample
from data_prep.tokenizing.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from rxt_dist.data.rows import SPECIAL_COUNT, SPECIAL_TOKENS
from rxt_dist.errors import DataError

fast = pytest.mark.skipif(not find_spec("gigatoken"), reason="gigatoken is missing")
NAMES = ["tokenizers", pytest.param("gigatoken", marks=fast)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_sample(folder / "texts", 60_000)
    texts = [path.read_text() for path in sorted((folder / "texts").rglob("*.*"))]
    documents = [Document(text, "en", "en", str(i)) for i, text in enumerate(texts)]
    save_tokenizer(train_tokenizer(documents, 1000), folder / "tokenizer.json")
    return folder / "tokenizer.json"


@pytest.mark.parametrize("name", NAMES)
def test_the_ids_are_those_of_the_library(tokenizer: Path, name: str) -> None:
    loaded = load_tokenizer(tokenizer)
    texts = ["", "One text.", "Zażółć gęślą jaźń", " x\n" * 50, "漢字"]
    rows = open_backend(name, tokenizer).encode(texts)
    assert [row.tolist() for row in rows] == [loaded.encode(text, add_special_tokens=False).ids for text in texts]
    assert {row.dtype for row in rows} == {np.dtype(np.uint16)}
    assert open_backend(name, tokenizer).encode([]) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_truncation_in_the_file_is_ignored(tokenizer: Path, name: str, tmp_path: Path) -> None:
    loaded = load_tokenizer(tokenizer)
    loaded.enable_truncation(300)
    loaded.save(str(tmp_path / "cut.json"))
    (whole,) = open_backend(name, tokenizer).encode(["long text " * 400])
    (found,) = open_backend(name, tmp_path / "cut.json").encode(["long text " * 400])
    assert len(found) > 300
    assert found.tolist() == whole.tolist()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(list(SPECIAL_TOKENS)), st.text(max_size=8)), min_size=1, max_size=20))
@pytest.mark.slow
def test_control_token_literals_never_become_control_ids(tokenizer: Path, name: str, pieces: list[str]) -> None:
    text = "".join(pieces)
    backend = _cached(name, tokenizer)
    (ids,) = backend.encode([text])
    assert int(ids.min(initial=SPECIAL_COUNT)) >= SPECIAL_COUNT
    assert load_tokenizer(tokenizer).decode(ids.tolist(), skip_special_tokens=False) == text


_backends: dict[tuple[str, Path], encode.Backend] = {}


def _cached(name: str, file: Path) -> encode.Backend:
    return _backends.setdefault((name, file), open_backend(name, file))


# ---------------------------------------------------------------------------------------------------------------------
# Choosing
# ---------------------------------------------------------------------------------------------------------------------


def test_the_probe_has_what_it_promises() -> None:
    texts = probe_texts()
    characters = set("".join(texts))
    assert all(any(ord(c) >> 16 == plane for c in characters) for plane in range(17))
    assert {chr(point) for point in range(0x10000) if not 0xD800 <= point <= 0xDFFF} <= characters
    assert all(any(token in text for text in texts) for token in SPECIAL_TOKENS)
    assert any("8" not in text and text.isdigit() and len(text) >= 1000 for text in texts)
    assert len(texts) > 9000
    assert probe_texts.__wrapped__() == texts


@fast
@pytest.mark.slow
def test_auto_takes_the_fast_one_where_it_is_equal(tokenizer: Path) -> None:
    assert choose_backend("auto", tokenizer, ["a document"]).name == "gigatoken"
    assert choose_backend("gigatoken", tokenizer, []).name == "gigatoken"
    assert choose_backend("tokenizers", tokenizer, []).name == "tokenizers"


def test_without_the_fast_one_auto_says_how_to_get_it(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    choice = choose_backend("auto", tokenizer, [])
    assert choice.name == "tokenizers"
    assert "pip install gigatoken==0.10.0" in choice.reason
    with pytest.raises(DataError, match="gigatoken is not installed"):
        choose_backend("gigatoken", tokenizer, [])


class _Wrong:
    """Equal to the reference, but for one word."""

    name = "gigatoken"

    def __init__(self, file: Path) -> None:
        self._reference = TokenizersBackend(file)

    def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
        rows = self._reference.encode(texts)
        for row, text in zip(rows, texts, strict=True):
            if "peculiar" in text:
                row[-1] += 1
        return rows


@pytest.mark.slow
def test_one_other_id_in_the_documents_is_enough_to_refuse(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "GigatokenBackend", _Wrong)
    assert choose_backend("auto", tokenizer, ["common"]).name == "gigatoken"
    choice = choose_backend("auto", tokenizer, ["common", "a peculiar text"])
    assert choice.name == "tokenizers"
    assert "other ids than tokenizers for 'a peculiar text', from token" in choice.reason
    with pytest.raises(DataError, match=r"cannot be used: gigatoken gives other ids .* --backend tokenizers"):
        choose_backend("gigatoken", tokenizer, ["a peculiar text"])


def test_a_shorter_or_longer_answer_is_a_difference(tokenizer: Path) -> None:
    class Short(_Wrong):
        def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
            return [row[:-1] for row in self._reference.encode(texts)]

    assert "from token" in str(first_difference(TokenizersBackend(tokenizer), Short(tokenizer), ["some text"]))


def test_a_panic_of_the_fast_one_is_no_end_of_the_build(tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicError(BaseException):
        pass

    class Panics(_Wrong):
        def encode(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint16]]:
            raise PanicError("index out of bounds")

    monkeypatch.setattr(encode, "GigatokenBackend", Panics)
    assert "fails on a probe (index out of bounds)" in choose_backend("auto", tokenizer, []).reason


def test_a_tokenizer_the_fast_one_cannot_load_is_left_to_the_other(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: Path) -> encode.Backend:
        raise ValueError("unknown pre-tokenizer")

    monkeypatch.setattr(encode, "GigatokenBackend", refuse)
    assert "cannot load this tokenizer (unknown pre-tokenizer)" in choose_backend("auto", tokenizer, []).reason


# ---------------------------------------------------------------------------------------------------------------------
# Very long texts
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_cutting_a_long_text_changes_no_id(tokenizer: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.building.encode._CHUNK_CHARACTERS", 40)
    monkeypatch.setattr("data_prep.building.encode._BATCH_CHARACTERS", 100)
    rng = random.Random(0)
    words = [
        "word",
        "słowo",
        "\n",
        "  ",
        "a-b",
        "don't",
        "12",
        "\n\n\n",
        "…",
        "[T]",
        " \t",
        ".",
        "漢字",
        "。",
        "x.y",
        "_",
    ]
    texts = ["".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(count)) for count in (3000, 1, 500)]
    pieces = list(chunks(texts[0]))
    assert len(pieces) > 50
    assert "".join(pieces) == texts[0]
    whole = [load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids for text in texts]
    assert [row.tolist() for row in open_backend(name, tokenizer).encode(texts)] == whole


@fast
def test_the_fast_one_forgets_its_words_when_the_process_has_grown(
    tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = iter([100, 100, 300, 500, 600])  # when loaded, at two checks, loaded again, at a check
    monkeypatch.setattr(encode, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(encode, "_FORGET_CHARACTERS", 50)
    monkeypatch.setattr(encode, "_FORGET_BYTES", 150)
    backend = encode.GigatokenBackend(tokenizer)
    used = [backend._encode]
    for _ in range(3):
        backend.encode(["word " * 6] * 2)
        used.append(backend._encode)
    assert [one is two for one, two in pairwise(used)] == [True, False, True]
    assert next(sizes, None) is None


def test_a_text_without_a_place_to_cut_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.building.encode._CHUNK_CHARACTERS", 10)
    assert list(chunks("=" * 100)) == ["=" * 100]
    assert list(chunks("1 2 3 4 5 6 7 8 9 10")) == ["1 2 3 4 5 6 7 8 9 10"]
