"""What an interaction begins with: its query or tool result as ids, up to the mode token, which comes after it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rxt_dist.data.interactions import ANSWER_ID, INTERNAL_ID, QUERY_ID, RESULT_ID, SYSTEM_HEADING, THINK_ID
from rxt_dist.data.rows import BOS_ID, EOS_ID
from rxt_dist.data.text import Text
from rxt_dist.errors import ConfigError, DataError

Mode = Literal["answer", "think", "auto"]
# The token after the query. In `auto` the model chooses, once, what it thinks more of.
MODES: dict[Mode, int | None] = {"answer": ANSWER_ID, "think": THINK_ID, "auto": None}


@dataclass(frozen=True)
class Prompt:
    """What the model is asked: a query, or the result of the tool that it called; and an instruction that the person
    who asks does not see.

    Raises:
        ConfigError: none or both of query and tool result, an empty one, an unknown mode.
    """

    query: str | None = None
    tool_result: str | None = None
    internal: str | None = None
    mode: Mode = "answer"

    def __post_init__(self) -> None:
        if (self.query is None) == (self.tool_result is None):
            raise ConfigError("An interaction begins with either a query or a tool result: give one of them.")
        name = "query" if self.query is not None else "tool result"
        if not (self.query or self.tool_result or "").strip():
            raise ConfigError(f"The {name} is empty, so there is nothing to answer: write something.")
        if self.mode not in MODES:
            raise ConfigError(f"The mode is '{self.mode}', but it is one of {', '.join(MODES)}.")

    def ids(self, text: Text, seq_len: int) -> list[int]:
        """[BOS] [I]internal [Q]query | [U]tool result, without the mode.

        Raises:
            DataError: no room is left for an answer, or the tokenizer lacks a control token that this needs.
        """
        parts = [(INTERNAL_ID, self.internal), (QUERY_ID, self.query), (RESULT_ID, self.tool_result)]
        given = [(marker, part) for marker, part in parts if part]
        text.require([marker for marker, _ in given] + ([] if self.mode == "answer" else [THINK_ID]))
        ids = [BOS_ID]
        for marker, part in given:
            ids += [marker, *text.encode(part)]
        # The mode, and one token of an answer.
        if len(ids) + 2 > seq_len:
            raise DataError(
                f"The prompt has {len(ids):,} tokens and leaves no room for an answer: with it an interaction has at "
                f"most {seq_len:,}. Shorten it, or tell it in several turns, which the memory joins."
            )
        return ids


def told(text: Text, query: str, answer: str) -> list[int]:
    """A whole interaction that took place elsewhere, to be written into a memory: [BOS] [Q]query [A]answer [EOS]."""
    return [BOS_ID, QUERY_ID, *text.encode(query), ANSWER_ID, *text.encode(answer), EOS_ID]


def system_instruction(text: Text, instruction: str) -> list[int]:
    """Instructions for a whole conversation, to be written into its first memory: [BOS] [I]instruction [EOS]."""
    text.require([INTERNAL_ID])
    return [BOS_ID, INTERNAL_ID, *text.encode(SYSTEM_HEADING + instruction), EOS_ID]
