"""Interactions and dialogues: records of .jsonl (.gz, .zst), .parquet and .arrow in, `Record`s out, one at a time.

A record is one interaction, a list of them, or a chat:

    {"query": ..., "answer": ...}                          also: think (or thinking), tool_call, tool_result, internal
    {"interactions": [{"query": ..., "answer": ...}, ...]}
    {"messages": [{"role": "system" | "user" | "assistant" | "tool", "content": ...}, ...]}

Beside `interactions` may stand a `system` prompt. Optional tags are `language` (or `lang`), `source` and `held_out`
(true: never trained on); an interaction of a list may say what it recalls (`recalls.py`). Values are text; a tool call
or result may be any JSON and is then kept as JSON text. A tool call of nothing ([], {}, nulls in any depth) is none,
and so is a tool result {}; the result [] says that nothing was found. What happens to bad input, counted in
`InteractionCounts`:

- A record with an interaction that has nothing to answer, or no answer and no tool call, is skipped as a whole: the
  rest of a dialogue may lean on it.
- Messages at the end of a chat that nothing answers are left out.
- Lone surrogates (from invalid UTF-8) become U+FFFD.
- Anything else that cannot be an interaction ends the reading, with file, line and field: the data are not what their
  owner believes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from data_prep.corpora import find_files
from data_prep.interactions.columns import OUR_COLUMNS, Columns
from data_prep.interactions.recalls import Recall, recalls_of
from data_prep.languages import language_of, language_tag
from data_prep.readers import OBJECT_SUFFIXES, objects
from data_prep.readers.base import LANGUAGE_COLUMNS, Fields, Input
from data_prep.units import identity
from rxt_dist.data.interactions import SYSTEM_HEADING, SYSTEM_QUERY
from rxt_dist.errors import DataError, nearest

MAX_RECORD_BYTES = 128 << 20
PART_FIELDS = {
    "query": "query",
    "answer": "answer",
    "think": "think",
    "thinking": "think",
    "tool_call": "tool_call",
    "tool_result": "tool_result",
    "internal": "internal",
}
_JSON_PARTS = ("tool_call", "tool_result")
_NO_CALL = ("[]", "{}", "null")
_LIST_FIELDS = ("interactions", "messages")
_THINK_OF_MESSAGE = ("think", "thinking", "reasoning_content")
_ROLES = ("system", "user", "assistant", "tool")
_OTHER_ROLES = {"human": "user", "gpt": "assistant"}
_ADVICE = (
    "Needed are 'query' and 'answer', 'interactions', or 'messages'; rename the {}, or say which is which "
    "(--column query=QUESTION)."
)
_NEEDED = (*PART_FIELDS, *_LIST_FIELDS)
_ALL = (*_NEEDED, *LANGUAGE_COLUMNS, "source", "held_out", "system")


@dataclass(frozen=True)
class Interaction:
    """One event; an absent part is empty. Either `query` or `tool_result` is what comes in, never both."""

    query: str = ""
    answer: str = ""
    think: str = ""
    tool_call: str = ""
    tool_result: str = ""
    internal: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether there is something to answer, and an answer or a tool call."""
        return bool((self.query or self.tool_result).strip() and (self.answer or self.tool_call).strip())

    @property
    def is_system_prompt(self) -> bool:
        """Whether it asks nothing: an instruction alone."""
        return not (self.query or self.tool_result)

    def in_alpha(self) -> Interaction:
        """A system prompt as RxT-Alpha has it, as the answer to a query that is always the same."""
        return Interaction(query=SYSTEM_QUERY, answer=self.internal.removeprefix(SYSTEM_HEADING))


@dataclass(frozen=True)
class Record:
    """One interaction, or the interactions of one dialogue in order. `place` is the file and line, for messages.

    recalls: what each interaction recalls; empty where none does. held_out: it is for evaluation, whatever its hash.
    system: what a dialogue begins with, an interaction that asks nothing, or None.
    """

    interactions: tuple[Interaction, ...]
    language: str
    source: str
    place: str
    recalls: tuple[Recall | None, ...] = ()
    held_out: bool = False
    system: Interaction | None = None


@dataclass
class InteractionCounts:
    """What was read, mended, shortened and left out; the last six are counted after reading. `other_kind` are records
    that were left out as asked: dialogues among single interactions, or the other way round."""

    records: int = 0
    interactions: int = 0
    empty: int = 0
    unanswered: int = 0
    repaired_utf8: int = 0
    shortened_queries: int = 0
    too_long: int = 0
    parts_left_out: int = 0
    not_in_template: int = 0
    escaped_literals: int = 0
    other_kind: int = 0

    def add(self, other: InteractionCounts) -> None:
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


def find_record_files(inputs: Iterable[Path | str]) -> list[Input]:
    """All files of the inputs (files or folders), sorted by name, and what the system says of them now.

    Raises:
        DataError: an input does not exist, or a file cannot hold interactions.
    """
    files = find_files(inputs)
    foreign = next((file.path for file in files if not file.name.lower().endswith(OBJECT_SUFFIXES)), None)
    if foreign is not None:
        raise DataError(
            f"{foreign} cannot hold interactions; they are read from {', '.join(OBJECT_SUFFIXES)}. Leave it out of the "
            f"inputs."
        )
    found = [(file, file.path.stat()) for file in files]
    return [Input(file.name, str(file.path), MAX_RECORD_BYTES, status.st_size, seen=identity(status))
            for file, status in found]  # fmt: skip


def read_records(file: Input, counts: InteractionCounts, columns: Columns = OUR_COLUMNS) -> Iterator[Record]:
    """The records of one file, in order; `counts` is added to while reading. `columns` says under which names.

    Raises:
        DataError: the file is not what its suffix says, or a record cannot be turned into interactions.
    """
    fields = Fields(columns.of(_ALL), columns.of(_NEEDED), _ADVICE.format("columns"), columns.of_a_table)
    for place, stored in objects(file, fields):
        value = columns.read(stored)
        interactions = _interactions(value, place, counts)
        if not interactions or not all(item.is_whole for item in interactions):
            counts.empty += 1
            continue
        mended = tuple(_mended(item) for item in interactions)
        counts.repaired_utf8 += mended != tuple(interactions)
        tag = next((_text(value[name], place, name) for name in LANGUAGE_COLUMNS if value.get(name)), "")
        language = language_tag(tag) if tag else language_of(file.name, _sample_text(mended))
        source = _folder_name(_text(value.get("source"), place, "source"))
        recalls = recalls_of(value["interactions"], [item.answer for item in mended], place) if _is_list(value) else ()
        held_out = _flag(value.get("held_out"), place, "held_out")
        counts.records += 1
        counts.interactions += len(mended)
        name = f"{source}-{language}" if source else language
        yield Record(mended, language, name, place, recalls, held_out, _system(value, place))


def _is_list(value: Mapping[str, Any]) -> bool:
    return value.get("interactions") is not None


def _system(value: Mapping[str, Any], place: str) -> Interaction | None:
    """The system prompt of a list of interactions; what a chat begins with is an instruction of its first one."""
    text = _text(value.get("system"), place, "system") if _is_list(value) else ""
    return _mended(Interaction(internal=SYSTEM_HEADING + text)) if text.strip() else None


def _flag(value: Any, place: str, name: str) -> bool:
    if value is None or isinstance(value, bool):
        return bool(value)
    raise DataError(f"{place}: '{name}' is {str(value)[:40]!r}, not true or false.")


def _interactions(value: Mapping[str, Any], place: str, counts: InteractionCounts) -> list[Interaction]:
    lists = [name for name in _LIST_FIELDS if value.get(name) is not None]
    if len(lists) == 2:
        raise DataError(f"{place} has both 'interactions' and 'messages'; keep one of them.")
    if lists:
        items = value[lists[0]]
        if not isinstance(items, list):
            raise DataError(f"{place}: '{lists[0]}' is a {type(items).__name__}, not a list.")
        if lists == ["messages"]:
            return _of_messages(items, place, counts)
        return [_interaction(item, place, f"interactions[{index}]") for index, item in enumerate(items)]
    if not PART_FIELDS.keys() & value.keys():
        raise DataError(f"{place} holds no interaction: it has the fields {sorted(value)}. {_ADVICE.format('fields')}")
    return [_interaction(value, place, "")]


def _interaction(value: Any, place: str, path: str) -> Interaction:
    if not isinstance(value, Mapping):
        raise DataError(f"{place}: '{path}' is a {type(value).__name__}; an interaction is an object with a 'query'.")
    parts: dict[str, str] = {}
    for field, part in PART_FIELDS.items():
        name = f"{path}.{field}" if path else field
        read = _json_text if part in _JSON_PARTS else _text
        text = read(value.get(field), place, name)
        if text and parts.get(part):
            raise DataError(f"{place}: '{name}' says '{part}' a second time; keep one of the two fields.")
        parts[part] = text or parts.get(part, "")
    return _checked(Interaction(**parts), place, path)


def _checked(interaction: Interaction, place: str, path: str) -> Interaction:
    if interaction.query and interaction.tool_result:
        where = f"'{path}'" if path else "the record"
        raise DataError(
            f"{place}: {where} has both 'query' and 'tool_result', but a tool's result stands in the place of the "
            f"query. Make two interactions of it."
        )
    return interaction


def _text(value: Any, place: str, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    raise DataError(f"{place}: '{name}' is a {type(value).__name__}, not text.")


def _json_text(value: Any, place: str, name: str) -> str:
    """A tool call or result as text; "" where there is none."""
    is_call = not name.endswith("tool_result")
    if isinstance(value, str):
        return "" if is_call and value.strip() in _NO_CALL else value
    try:
        if value is None or value == {} or (is_call and _is_nothing(value)):
            return ""
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, RecursionError) as error:
        raise DataError(f"{place}: '{name}' cannot be kept as JSON ({error}). Make it text.") from error


def _is_nothing(value: Any) -> bool:
    """Whether it is null, or holds nothing else in any depth."""
    if isinstance(value, Mapping):
        return all(_is_nothing(item) for item in value.values())
    return value is None or (isinstance(value, list) and all(_is_nothing(item) for item in value))


# ---------------------------------------------------------------------------------------------------------------------
# Chats
# ---------------------------------------------------------------------------------------------------------------------


def _of_messages(messages: Sequence[Any], place: str, counts: InteractionCounts) -> list[Interaction]:
    """A chat as interactions: each assistant message closes one. A system message is the internal instruction of the
    interaction that follows it; tool messages in a row are one tool result."""
    found: list[Interaction] = []
    open_parts: dict[str, str] = {}
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise DataError(f"{place}: '{name}' is a {type(message).__name__}; a message is an object with a 'role'.")
        if "role" not in message:
            raise DataError(
                f"{place}: '{name}' has the fields {sorted(message)}; a message needs 'role' ({', '.join(_ROLES)}) and "
                f"'content': rename them."
            )
        role = message.get("role")
        role = _OTHER_ROLES.get(role, role) if isinstance(role, str) else role
        content = _text(message.get("content"), place, f"{name}.content")
        asked = "query" in open_parts or "tool_result" in open_parts
        if role == "system" and not open_parts:
            open_parts["internal"] = content
        elif role == "user" and not asked:
            open_parts["query"] = content
        elif role == "tool" and "tool_result" in open_parts:
            open_parts["tool_result"] += "\n" + content
        elif role == "tool" and found and not asked:
            open_parts["tool_result"] = content
        elif role == "assistant" and asked:
            found.append(Interaction(**open_parts, answer=content, **_parts_of_answer(message, place, name)))
            open_parts = {}
        else:
            raise DataError(f"{place}: {_why_not(role, name, index, open_parts)}")
    counts.unanswered += bool(open_parts)
    return found


def _parts_of_answer(message: Mapping[str, Any], place: str, name: str) -> dict[str, str]:
    thoughts = [_text(message.get(field), place, f"{name}.{field}") for field in _THINK_OF_MESSAGE]
    call = _json_text(message.get("tool_calls"), place, f"{name}.tool_calls")
    return {"think": next(filter(None, thoughts), ""), "tool_call": call}


def _why_not(role: Any, name: str, index: int, open_parts: Mapping[str, str]) -> str:
    if role not in _ROLES:
        return f"'{name}.role' is {role!r}; known are {', '.join(_ROLES)}.{nearest(str(role), _ROLES)}"
    waiting = {"query": "a user message", "tool_result": "a tool's result", "internal": "a system message"}
    before = next((text for part, text in waiting.items() if part in open_parts), None)
    if role == "assistant":
        what = f"follows {before}" if before else "is the first" if index == 0 else "follows another one"
        return f"'{name}' is an assistant message that answers nothing (it {what}). Remove or join it."
    if role == "tool" and before is None:
        return f"'{name}' is a tool's result, but no assistant message before it called a tool. Remove it."
    return (
        f"'{name}' has role '{role}' right after {before} that nothing has answered yet; an interaction has one query. "
        f"Join the two messages, or remove one."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Text and tags
# ---------------------------------------------------------------------------------------------------------------------


def _mended(interaction: Interaction) -> Interaction:
    """The interaction with U+FFFD for each lone surrogate."""
    parts: dict[str, str] = vars(interaction)
    try:
        "".join(parts.values()).encode()
    except UnicodeEncodeError:
        return Interaction(**{part: re.sub("[\ud800-\udfff]", "\ufffd", text) for part, text in parts.items()})
    return interaction


def _sample_text(interactions: Sequence[Interaction]) -> str:
    return " ".join(f"{item.query} {item.answer}" for item in interactions[:4])


def _folder_name(tag: str) -> str:
    """A tag as lower-case letters, digits and single hyphens, safe as a folder's name; may be empty."""
    return re.sub(r"[^a-z0-9]+", "-", tag.lower()).strip("-")
