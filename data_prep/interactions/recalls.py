"""What an interaction asks of the memory, and which of its tokens answer that.

An interaction of a dialogue may say `"recall": {"distance": 3, "value": "Rex"}`: its answer holds a value, once, that
was told three turns before. Training reads it as any other; evaluation measures recall by distance at these tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rxt_dist.errors import DataError

FIELD = "recall"
_MOST_TURNS = 65535  # shards hold a distance as 16 bits
_FORM = "it is {'distance': turns since it was told, 'value': what the answer holds}"


class Recall(NamedTuple):
    """A value that was told `distance` turns before the one that answers with it."""

    distance: int
    value: str


def recalls_of(items: Sequence[Any], answers: Sequence[str], place: str) -> tuple[Recall | None, ...]:
    """What each interaction of a dialogue recalls; empty where none recalls anything.

    Args:
        items: the interactions as they were read, objects all.
        answers: their answers as text.

    Raises:
        DataError: a `recall` that says no turn of this dialogue, or a value that its answer does not hold exactly once.
    """
    found = tuple(
        _recall(item.get(FIELD), turn, answer, place)
        for turn, (item, answer) in enumerate(zip(items, answers, strict=True))
    )
    return found if any(found) else ()


def _recall(said: Any, turn: int, answer: str, place: str) -> Recall | None:
    # A table gives a struct of nulls where there is none.
    if said is None or (isinstance(said, Mapping) and all(value is None for value in said.values())):
        return None
    where = f"{place}: 'interactions[{turn}].{FIELD}'"
    if not isinstance(said, Mapping) or not {"distance", "value"} <= said.keys():
        raise DataError(f"{where} is {str(said)[:80]!r}; {_FORM}.")
    distance, value = said["distance"], said["value"]
    if not isinstance(distance, int) or isinstance(distance, bool) or not isinstance(value, str) or not value:
        raise DataError(f"{where} is {str(said)[:80]!r}; {_FORM}, a whole number and a text.")
    if not 1 <= distance <= min(turn, _MOST_TURNS):
        raise DataError(
            f"{where} has distance {distance}, but {turn} turns lie before this one: nothing can have been told there."
        )
    times = answer.count(value)
    if times != 1:
        raise DataError(
            f"{where} has the value {value[:80]!r}, which the answer {answer[:80]!r} holds {times} times instead of "
            f"once: nobody could say which tokens recall it."
        )
    return Recall(distance, value)


class SpanFinder:
    """Which tokens of a text cover a part of it. The tokenizer is loaded when it is first asked."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._tokenizer: Any = None

    def span(self, text: str, value: str, tokens: int) -> tuple[int, int]:
        """First token and end of those that cover `value`, which stands in `text` once; `tokens` is how many all are.

        A token that holds a blank before the value as well is one of them, and so is one of several for a character.
        """
        if self._tokenizer is None:
            from data_prep.tokenizing.tokenizer import load_tokenizer

            self._tokenizer = load_tokenizer(self._file)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        assert len(encoding.ids) == tokens, "the tokens of an answer are not those of its text"
        start = text.index(value)
        stop = start + len(value)
        covering = [n for n, (first, end) in enumerate(encoding.offsets) if first < stop and end > start]
        return covering[0], covering[-1] + 1
