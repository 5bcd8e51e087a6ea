"""Prompts and texts: control tokens cannot be spelt, characters come whole, what does not fit is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rxt_dist.data.rows import SPECIAL_COUNT, SPECIAL_TOKENS
from rxt_dist.data.text import Pieces, Text
from rxt_dist.errors import ConfigError, DataError
from rxt_dist.inference.events import Answer, Reading
from rxt_dist.inference.prompts import Prompt, system_instruction, told


@pytest.fixture
def text(tmp_path: Path) -> Text:
    return Text(byte_tokenizer(tmp_path / "tokenizer.json"), 128)


def test_the_order_of_parts(text: Text) -> None:
    def spelt(word: str) -> list[int]:
        return text.encode(word)

    assert Prompt("hi").ids(text, 64) == [2, 5, *spelt("hi")]
    assert Prompt("hi", internal="be kind").ids(text, 64) == [2, 10, *spelt("be kind"), 5, *spelt("hi")]
    assert Prompt(tool_result="[]", internal="x").ids(text, 64) == [2, 10, *spelt("x"), 9, *spelt("[]")]
    assert told(text, "q", "a") == [2, 5, *spelt("q"), 6, *spelt("a"), 3]
    assert system_instruction(text, "x") == [2, 10, *spelt("SYSTEM INSTRUCTIONS\n\nx"), 3]


def test_text_cannot_spell_control_tokens(text: Text) -> None:
    for name in SPECIAL_TOKENS:
        ids = text.encode(f"a {name}{name}")
        assert min(ids) >= SPECIAL_COUNT
        assert text.decode(ids) == f"a {name}{name}"


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({}, "either a query or a tool result"),
        ({"query": "a", "tool_result": "b"}, "either a query or a tool result"),
        ({"query": " \n"}, "query is empty"),
        ({"tool_result": ""}, "tool result is empty"),
        ({"query": "a", "mode": "fast"}, "mode is 'fast'"),
    ],
)
def test_prompts_that_ask_nothing(values: dict[str, str], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Prompt(**values)  # type: ignore[arg-type]


def test_a_prompt_that_fills_the_row(text: Text) -> None:
    """Mode and one token of an answer must fit."""
    assert len(Prompt("x" * 12).ids(text, 16)) == 14
    with pytest.raises(DataError, match="15 tokens and leaves no room"):
        Prompt("x" * 13).ids(text, 16)


def test_a_vocabulary_without_later_control_tokens(tmp_path: Path) -> None:
    """RxT-Alpha's: id 7 to 10 are words there."""
    vocabulary = {name: number for name, number in SPECIAL_TOKENS.items() if number < 7}
    vocabulary |= {chr(97 + letter): 7 + letter for letter in range(26)}
    text = Text(byte_tokenizer(tmp_path / "alpha.json", vocabulary), 64)
    assert text.controls == set(range(7))
    assert Prompt("abc").ids(text, 64) == [2, 5, 7, 8, 9]
    for prompt in (Prompt("abc", mode="auto"), Prompt(tool_result="abc"), Prompt("abc", internal="abc")):
        with pytest.raises(DataError, match="does not have"):
            prompt.ids(text, 64)


def test_tokenizers_that_are_none_or_another_models(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        Text(tmp_path / "none.json", 128)
    (tmp_path / "torn.json").write_text('{"model":')
    with pytest.raises(DataError, match="is not a tokenizer"):
        Text(tmp_path / "torn.json", 128)
    with pytest.raises(DataError, match="ids up to 106, but the model's vocabulary is 100"):
        Text(byte_tokenizer(tmp_path / "large.json"), 100)
    with pytest.raises(DataError, match=r"does not have \[BOS\], \[EOS\], \[Q\], \[A\]"):
        Text(byte_tokenizer(tmp_path / "bare.json", {"a": 0, "b": 1}), 100)


def test_characters_are_told_whole(tmp_path: Path) -> None:
    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 11)}
    tokenizer = Tokenizer(models.BPE(vocab=SPECIAL_TOKENS | alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(tmp_path / "bytes.json"))
    text = Text(tmp_path / "bytes.json", 512)
    ids = text.encode("ż🦊 a")
    assert len(ids) == 8
    pieces = Pieces(text)
    assert [pieces.add(token) for token in ids] == ["", "ż", "", "", "", "🦊", " ", "a"]
    assert pieces.rest() == ""
    assert pieces.add(ids[0]) == ""
    assert pieces.rest() == "\ufffd", "a character that never became whole"
    reading = Reading(text)
    assert reading.token(7).part == "think"
    assert reading.token(ids[0]).text == ""
    cut = reading.token(6)
    assert (cut.part, cut.text) == ("think", "\ufffd"), "what was left belongs to the part that ends"
    assert reading.token(ids[-1]).part == "answer"


def test_an_answer_is_taken_apart(text: Text) -> None:
    ids = [7, *text.encode("hm"), 6, *text.encode("yes"), 8, *text.encode("{}"), 3]
    found = Answer.of(ids, text)
    assert (found.think, found.answer, found.call, found.ended) == ("hm", "yes", "{}", True)
    assert Answer.of(ids[:-1], text).ended is False
