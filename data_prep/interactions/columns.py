"""Records whose fields have other names than ours: which of theirs is which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rxt_dist.errors import ConfigError, nearest

OURS = (
    "query", "answer", "think", "tool_call", "tool_result", "internal", "interactions", "messages", "role", "content",
    "language", "source", "held_out", "system",
)  # fmt: skip
_LISTS = ("interactions", "messages")
_OF_A_RECORD = (*_LISTS, "language", "source", "held_out", "system")
_OTHER_NAMES = {"think": ("thinking", "reasoning_content"), "language": ("lang",)}


@dataclass(frozen=True)
class Columns:
    """Names of the fields of records, and of the objects in their lists: pairs of ours and theirs. A field of ours that
    has a pair is read under their name only."""

    pairs: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def parse(given: Sequence[str]) -> Columns:
        """From texts as `query=question`.

        Raises:
            ConfigError: a text without "=", a field that there is not, one named twice, or a column for two fields.
        """
        pairs = []
        for text in given:
            ours, equals, theirs = (part.strip() for part in text.partition("="))
            if not equals or not theirs:
                raise ConfigError(f"--column is {text!r}; it is FIELD=COLUMN, as query=question.")
            if ours not in OURS:
                raise ConfigError(
                    f"--column names the field '{ours}'; known are {', '.join(OURS)}.{nearest(ours, OURS)}"
                )
            pairs.append((ours, theirs))
        for index, what in enumerate(("field", "column")):
            names = [pair[index] for pair in pairs]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ConfigError(f"--column names the {what} '{twice}' more than once; name each once.")
        return Columns(tuple(sorted(pairs)))

    @property
    def of_a_table(self) -> tuple[str, ...]:
        """Columns that a table has to have: the others may stand in the objects of its lists."""
        return tuple(theirs for ours, theirs in self.pairs if ours in _OF_A_RECORD)

    def of(self, ours: Sequence[str]) -> tuple[str, ...]:
        """The names under which these fields of ours stand in a record."""
        names = dict(self.pairs)
        return tuple(names.get(name, name) for name in ours)

    def read(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The record under our names."""
        if not self.pairs:
            return record
        value = self._renamed(record)
        for name in _LISTS:
            if isinstance(items := value.get(name), list):
                value[name] = [self._renamed(item) if isinstance(item, Mapping) else item for item in items]
        return value

    def _renamed(self, value: Mapping[str, Any]) -> dict[str, Any]:
        names = dict(self.pairs)
        taken = {*names, *names.values(), *(other for name in names for other in _OTHER_NAMES.get(name, ()))}
        kept = {name: item for name, item in value.items() if name not in taken}
        return kept | {ours: value[theirs] for ours, theirs in self.pairs if theirs in value}


OUR_COLUMNS = Columns()
