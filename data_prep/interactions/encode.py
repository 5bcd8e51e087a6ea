"""Interactions -> ids, in the order of parts that `rxt_dist.data.interactions` describes.

What does not fit into `seq_len` tokens: the oldest text of the query (or tool result) is left out, so that the
interaction just fits. The instruction, the thinking, the answer and the tool call are never cut, as half an answer
would teach a wrong ending; a record whose query would keep fewer than 16 tokens is dropped. Both are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from data_prep.building.encode import Backend
from data_prep.interactions.reader import Interaction, InteractionCounts, Record
from data_prep.interactions.recalls import SpanFinder
from rxt_dist.data.interactions import (
    ANSWER_ID,
    CALL_ID,
    INTERNAL_ID,
    QUERY_ID,
    RESULT_ID,
    SYSTEM_QUERY,
    THINK_ID,
)
from rxt_dist.data.manifest import canonical_json
from rxt_dist.data.rows import BOS_ID, EOS_ID, SPECIAL_TOKENS

MIN_QUERY_TOKENS = 16
_PARTS = (
    ("internal", INTERNAL_ID),
    ("query", QUERY_ID),
    ("tool_result", RESULT_ID),
    ("think", THINK_ID),
    ("answer", ANSWER_ID),
    ("tool_call", CALL_ID),
)
_INPUT_IDS = (QUERY_ID, RESULT_ID)
_ANSWER_IDS = (THINK_ID, ANSWER_ID, CALL_ID)
_NOT_IN_ALPHA = ("internal", "think", "tool_call")
_CONTROL_LITERAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


@dataclass(frozen=True)
class EncodedRecord:
    """A record as ids: for each interaction uint16 [tokens], BOS and EOS included. `targets` are the tokens with loss,
    `rank` is 64 bits of the hash of the record's texts, `ordinal` its number among the records of the unit.

    recalls: (distance, first token, end) of the value that each turn recalls, zeros where it recalls none; empty where
    no turn does. held_out: it is for evaluation, whatever its rank.
    """

    ordinal: int
    turns: list[npt.NDArray[np.uint16]]
    targets: int
    language: str
    source: str
    text_bytes: int
    literals: int
    rank: int
    recalls: tuple[tuple[int, int, int], ...] = ()
    held_out: bool = False

    @property
    def tokens(self) -> int:
        return sum(len(turn) for turn in self.turns)


class InteractionEncoder:
    """Encodes records for one template and row length; `counts` is added to, `spans` knows the backend's tokens.
    dialogues: system prompts have a place, a turn of their own."""

    def __init__(
        self,
        backend: Backend,
        seq_len: int,
        template: str,
        counts: InteractionCounts,
        spans: SpanFinder,
        dialogues: bool,
    ) -> None:
        self._backend, self._seq_len, self._template, self._counts = backend, seq_len, template, counts
        self._spans, self._dialogues = spans, dialogues

    def encode(self, records: list[Record], first_ordinal: int) -> Iterator[EncodedRecord]:
        """The records that fit the template and the row, in order."""
        shaped = [self._shaped(record) for record in records]
        texts = [text for record in shaped if record for item in record for _, text in _layout(item)]
        encoded = iter(self._backend.encode(texts))
        for ordinal, (record, interactions) in enumerate(zip(records, shaped, strict=True), start=first_ordinal):
            if interactions is None:
                continue
            # Every text's ids are taken from the iterator before anything is dropped.
            parts = [[(marker, next(encoded)) for marker, _ in _layout(item)] for item in interactions]
            prompts = self._prompts_among(interactions)
            turns = [self._turn(of, may_shorten=number >= prompts) for number, of in enumerate(parts)]
            whole = [ids for ids, _ in turns if ids is not None]
            if len(whole) < len(turns):
                self._counts.too_long += 1
                continue
            self._counts.shortened_queries += sum(cut for _, cut in turns)
            # Each marker and token on the answer side is followed by a token that carries loss.
            on_answer_side = [1 + len(ids) for of in parts[prompts:] for marker, ids in of if marker in _ANSWER_IDS]
            texts_of = [text for item in interactions for _, text in _layout(item)]
            literals = sum(len(_CONTROL_LITERAL.findall(text)) for text in texts_of if "[" in text)
            self._counts.escaped_literals += literals
            yield EncodedRecord(
                ordinal=ordinal,
                turns=whole,
                targets=sum(on_answer_side),
                language=record.language,
                source=record.source,
                text_bytes=sum(len(text.encode()) for text in texts_of),
                literals=literals,
                rank=_rank((*_prompts(record), *record.interactions)),
                recalls=self._recalls(record, parts, whole),
                held_out=record.held_out,
            )

    def _recalls(
        self, record: Record, parts: list[list[tuple[int, npt.NDArray[np.uint16]]]], turns: list[npt.NDArray[np.uint16]]
    ) -> tuple[tuple[int, int, int], ...]:
        if not record.recalls:
            return ()
        # The system prompt, which recalls nothing, is no interaction.
        before = len(turns) - len(record.interactions)
        found = [(0, 0, 0)] * before
        for recall, interaction, of_turn, turn in zip(
            record.recalls, record.interactions, parts[before:], turns[before:], strict=True
        ):
            if recall is None:
                found.append((0, 0, 0))
                continue
            markers = [marker for marker, _ in of_turn]
            at = markers.index(ANSWER_ID)
            # Counted from the end, since the query may have been shortened.
            first = len(turn) - 1 - sum(1 + len(ids) for _, ids in of_turn[at:]) + 1
            start, end = self._spans.span(interaction.answer, recall.value, len(of_turn[at][1]))
            found.append((recall.distance, first + start, first + end))
        return tuple(found)

    def _shaped(self, record: Record) -> list[Interaction] | None:
        """The interactions with the parts that the template has, or None where it cannot express one of them."""
        prompts = _prompts(record) if self._dialogues else ()
        if self._template == "alpha" and any(item.tool_result or not item.answer for item in record.interactions):
            self._counts.not_in_template += 1
            return None
        self._counts.parts_left_out += len(_prompts(record)) - len(prompts)
        if self._template == "beta":
            return [*prompts, *record.interactions]
        self._counts.parts_left_out += sum(
            bool(getattr(item, part)) for item in record.interactions for part in _NOT_IN_ALPHA
        )
        kept = [replace(item, **dict.fromkeys(_NOT_IN_ALPHA, "")) for item in record.interactions]
        return [*(prompt.in_alpha() for prompt in prompts), *kept]

    def _prompts_among(self, interactions: list[Interaction]) -> int:
        """How many interactions, the first one or none, are a system prompt, also one that the records spell out."""
        first = interactions[0]
        is_alpha = self._template == "alpha" and first.query == SYSTEM_QUERY
        return int(self._dialogues and (first.is_system_prompt or is_alpha))

    def _turn(
        self, parts: list[tuple[int, npt.NDArray[np.uint16]]], may_shorten: bool
    ) -> tuple[npt.NDArray[np.uint16] | None, bool]:
        """(ids of one interaction, or None where it cannot fit; whether its query was shortened)."""
        excess = 2 + sum(1 + len(ids) for _, ids in parts) - self._seq_len
        if excess > 0:
            asked = next((len(ids) for marker, ids in parts if marker in _INPUT_IDS), 0)
            if not may_shorten or asked - excess < MIN_QUERY_TOKENS:
                return None, False
            parts = [(marker, ids[excess:] if marker in _INPUT_IDS else ids) for marker, ids in parts]
        pieces = [piece for marker, ids in parts for piece in ([marker], ids)]
        return np.concatenate([[BOS_ID], *pieces, [EOS_ID]]).astype(np.uint16), excess > 0


def _layout(interaction: Interaction) -> list[tuple[int, str]]:
    """(marker, text) of each part, in order. A tool call without thinking or answer stands after an empty [A]: the
    token after the query is always the mode, chosen by the caller, and the call is the model's own."""
    parts = [(marker, getattr(interaction, part)) for part, marker in _PARTS]
    kept = [(marker, text) for marker, text in parts if text]
    if not interaction.think and not interaction.answer and not interaction.is_system_prompt:
        kept.insert(-1, (ANSWER_ID, ""))
    return kept


def _prompts(record: Record) -> tuple[Interaction, ...]:
    return (record.system,) if record.system else ()


def _rank(interactions: tuple[Interaction, ...]) -> int:
    content = canonical_json([vars(item) for item in interactions])
    return int.from_bytes(blake3(content.encode()).digest()[:8], "little")
