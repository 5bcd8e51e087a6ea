"""Text and ids, by the tokenizer of a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer

from rxt_dist.data.interactions import ANSWER_ID, QUERY_ID
from rxt_dist.data.manifest import tokenizer_fingerprint
from rxt_dist.data.rows import BOS_ID, EOS_ID, SPECIAL_TOKENS
from rxt_dist.errors import DataError

_NAMES = {number: name for name, number in SPECIAL_TOKENS.items()}
_NEEDED = (BOS_ID, EOS_ID, QUERY_ID, ANSWER_ID)
_PARTIAL = "\ufffd"


class Text:
    """A tokenizer.json whose text cannot spell control tokens: "[T]" in a query is three characters.

    fingerprint: of what decides its ids. controls: ids of the control tokens that it has.

    Raises:
        DataError: it is missing, unreadable, of another vocabulary than the model's, or lacks control tokens.
    """

    def __init__(self, path: Path, vocab_size: int) -> None:
        if not path.is_file():
            raise DataError(f"The tokenizer {path} does not exist, and without it no text can be read or written.")
        try:
            content = path.read_text(encoding="utf-8")
            self._tokenizer = Tokenizer.from_str(content)
            self.fingerprint = tokenizer_fingerprint(content)
        except Exception as error:  # the library raises bare Exception
            raise DataError(f"{path} is not a tokenizer.json of the `tokenizers` library ({error}).") from error
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        largest = max(self._tokenizer.get_vocab().values(), default=-1)
        if largest >= vocab_size:
            raise DataError(
                f"{path} has ids up to {largest:,}, but the model's vocabulary is {vocab_size:,}: it belongs to "
                "another model. Name the tokenizer that this one was trained with."
            )
        self.path = path
        found = {name: self._tokenizer.token_to_id(name) for name in SPECIAL_TOKENS}
        self.controls = frozenset(number for name, number in SPECIAL_TOKENS.items() if found[name] == number)
        self.require(_NEEDED)

    def require(self, controls: Iterable[int]) -> None:
        """Raise DataError unless the tokenizer has these control tokens at their ids."""
        missing = [_NAMES[number] for number in controls if number not in self.controls]
        if missing:
            raise DataError(
                f"{self.path} does not have {', '.join(missing)} at the ids that interactions use, so the model cannot "
                "have learnt them. Leave out what needs them, or name the model's own tokenizer."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of ids that are no control tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


class Pieces:
    """Text as its ids come in: a piece is told once its last character is whole."""

    def __init__(self, text: Text) -> None:
        self._text = text
        self._waiting: list[int] = []

    def add(self, token: int) -> str:
        """What has become certain with this id; empty while a character lacks bytes."""
        self._waiting.append(token)
        piece = self._text.decode(self._waiting)
        return "" if piece.endswith(_PARTIAL) else self._told(piece)

    def rest(self) -> str:
        """What is left at the end of a part, with U+FFFD for what never became whole."""
        return self._told(self._text.decode(self._waiting) if self._waiting else "")

    def _told(self, piece: str) -> str:
        self._waiting.clear()
        return piece
