"""What happens while a model answers, and what an answer is in the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from rxt_dist.data.interactions import ANSWER_ID, CALL_ID, THINK_ID
from rxt_dist.data.rows import EOS_ID
from rxt_dist.data.text import Pieces, Text

PartName = Literal["think", "answer", "call"]
PARTS: dict[int, PartName] = {THINK_ID: "think", ANSWER_ID: "answer", CALL_ID: "call"}
# What published code streams in their place.
WRITE_STARTED, WRITTEN = -1, -2


@dataclass(frozen=True)
class Token:
    """A token of an answer; the first is the mode.

    part: what it belongs to. text: what can be read with it, empty for a control token and within a character.
    """

    id: int
    part: PartName
    text: str


@dataclass(frozen=True)
class WriteStarted:
    """The answer is whole, and the memory is being written in the background."""


@dataclass(frozen=True)
class Written:
    """The memory holds the interaction. turn: interactions so far; moved: see `Session.moved`."""

    turn: int
    moved: tuple[float, ...]


Event = Token | WriteStarted | Written


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    ids: mode, generated tokens and [EOS]. ended: whether the model ended it, or the limit did.
    call: what it wants of a tool; the result is the next interaction's `tool_result`.
    """

    ids: tuple[int, ...]
    think: str
    answer: str
    call: str
    ended: bool

    @staticmethod
    def of(ids: Iterable[int], text: Text) -> Answer:
        """Take apart what was generated, the mode first."""
        ids = tuple(ids)
        parts: dict[PartName, list[int]] = {"think": [], "answer": [], "call": []}
        current = parts["answer"]
        for token in ids:
            if token in PARTS:
                current = parts[PARTS[token]]
            elif token != EOS_ID:
                current.append(token)
        texts = {name: text.decode(of_part) for name, of_part in parts.items()}
        return Answer(ids, **texts, ended=ids[-1:] == (EOS_ID,))


class Reading:
    """Tokens as they come, with their parts and texts."""

    def __init__(self, text: Text) -> None:
        self._pieces = Pieces(text)
        self._part: PartName = "answer"

    def token(self, token: int) -> Token:
        """The event of the next id."""
        if token in PARTS or token == EOS_ID:
            rest = self._pieces.rest()
            part, self._part = self._part, PARTS.get(token, self._part)
            return Token(token, part if rest else self._part, rest)
        return Token(token, self._part, self._pieces.add(token))


def token_ids(events: Iterable[Event], with_mode: bool = True) -> Iterator[int]:
    """The stream of published code: ids, then -1 (the write begins) and -2 (written).

    Args:
        with_mode: begin with the mode token, as RxT-Beta's code does and RxT-Alpha's does not.
    """
    first = True
    for event in events:
        if isinstance(event, Token):
            if with_mode or not first:
                yield event.id
            first = False
        else:
            yield WRITE_STARTED if isinstance(event, WriteStarted) else WRITTEN
