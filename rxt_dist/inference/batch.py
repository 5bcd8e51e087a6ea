"""Many conversations from a file: a JSON object a line comes in, the same with its answers goes out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rxt_dist.errors import DataError, UserError
from rxt_dist.inference.assistant import Assistant
from rxt_dist.inference.events import Answer
from rxt_dist.inference.prompts import Prompt
from rxt_dist.inference.sampling import Sampling

_FIELDS = ("query", "tool_result", "internal", "mode")


@dataclass(frozen=True)
class Conversation:
    """A line of the file: what it said, and its turns."""

    record: dict[str, Any]
    turns: tuple[Prompt, ...]
    system: str | None


def read_conversations(path: Path, assistant: Assistant) -> list[Conversation]:
    """All lines, each checked as far as it can be before anything is answered.

    A line is one prompt ({"query": ...}) or several turns of one conversation ({"turns": [{"query": ...}, ...]}), and
    may have a `system` instruction. Other fields are kept.

    Raises:
        DataError: the file is missing, a line is no such object, or a prompt leaves no room for an answer; with its
            number.
    """
    try:
        # Text of a record may hold other characters that end lines, which JSON allows.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as lines of JSON ({error}).") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(_conversation(line, assistant))
            except (UserError, ValueError) as error:
                raise DataError(f"{path}, line {number}: {error}") from error
    if not found:
        raise DataError(f"{path} has no line, so there is nothing to answer.")
    return found


def _conversation(line: str, assistant: Assistant) -> Conversation:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"this is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise DataError(f"a line must be an object with a query or with turns, and is {type(record).__name__}")
    turns = record.get("turns", [record])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError("turns must be a list of objects, at least one")
    prompts = tuple(_prompt(turn) for turn in turns)
    for prompt in prompts:
        prompt.ids(assistant.text, assistant.config.seq_len)
    system = record.get("system")
    if system is not None and not isinstance(system, str):
        raise DataError(f"system must be text, and is {type(system).__name__}")
    return Conversation(record, prompts, system)


def _prompt(turn: dict[str, Any]) -> Prompt:
    given = {name: turn[name] for name in _FIELDS if turn.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{name} must be text, and is {type(value).__name__}")
    return Prompt(**given)


def answer_all(
    assistant: Assistant,
    conversations: list[Conversation],
    sampling: Sampling,
    *,
    at_once: int,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[dict[str, Any]]:
    """The records with their `answers`, in order. Conversation n has a memory of its own, by the seed `seed` + n.

    Args:
        at_once: conversations that are answered together; what each gets does not depend on it.
        report: told how many are answered.
    """
    for first in range(0, len(conversations), at_once):
        group = conversations[first : first + at_once]
        sessions = [
            assistant.session(seed + first + number, conversation.system) for number, conversation in enumerate(group)
        ]
        answers: list[list[Answer]] = [[] for _ in group]
        for turn in range(max(len(conversation.turns) for conversation in group)):
            going = [number for number, conversation in enumerate(group) if turn < len(conversation.turns)]
            prompts = [group[number].turns[turn] for number in going]
            told = assistant.answer([sessions[number] for number in going], prompts, sampling)
            for number, answer in zip(going, told, strict=True):
                answers[number].append(answer)
        for conversation, of_conversation in zip(group, answers, strict=True):
            yield conversation.record | {"answers": [_shown(answer) for answer in of_conversation]}
        report(f"{min(first + at_once, len(conversations)):,} of {len(conversations):,} conversations")


def _shown(answer: Answer) -> dict[str, Any]:
    """Parts that are not there are left out."""
    return {name: value for name, value in asdict(answer).items() if name != "ids" and value != ""}
