"""YAML read as plain values that remember the file and line of each, with other files joined and overrides applied.

A text may be hostile or a slip: its length, depth and values are bounded, and so is what it comes to when every alias
is written out, so that no text takes long to read.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml

from rxt_dist.errors import ConfigError, nearest

KeyPath = tuple[str | int, ...]

# Bounds of a text: far above any real configuration, and read within a second or two.
_MOST_BYTES = 200_000
_LONGEST_VALUE = 4_096
_LONGEST_KEY = 200
_DEEPEST = 32
# An override in a message is cut after so many characters.
_SHOWN = 80
# What fits a signed number of 64 bits; a greater one is no count of anything.
_MOST_WHOLE = 2**63 - 1
_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = frozenset(_TAG + kind for kind in ("str", "int", "float", "bool", "null", "timestamp"))
_NESTED_TAGS = frozenset((_TAG + "map", _TAG + "seq"))

# YAML 1.1 takes 1e6 and 4.0e9 for text; a person means numbers.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


def dotted(path: KeyPath) -> str:
    """`("train", "lr")` as `train.lr`."""
    return ".".join(str(part) for part in path)


class _Loader(yaml.SafeLoader):
    """Refuses what is nested too deeply where it begins: to compose it would need as deep a recursion."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(
                problem=f"it is nested deeper than {_DEEPEST} levels", problem_mark=self.peek_event().start_mark
            )
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node


@dataclass
class Tree:
    """Plain values, and where each of them was written."""

    source: str
    values: Any
    places: dict[KeyPath, str] = field(default_factory=dict)
    _characters: int = 0

    @classmethod
    def read(cls, path: Path, named_at: str = "") -> Self:
        """Read one YAML file; `named_at` says where another file names it."""
        text = _text_of(path, named_at)
        tree = cls(os.path.normpath(path), None)
        try:
            node = yaml.compose(text, Loader=_Loader)
            tree.values = tree._convert(node, ()) if node else {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise ConfigError(f"{path}:{line}: this is not valid YAML: {error.problem or error.context}.") from None
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise ConfigError(f"{path}:{line}: this is not valid YAML: {error.reason}.") from None
        return tree

    def place(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest mapping around it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.source)

    def _convert(self, node: yaml.Node, path: KeyPath) -> Any:
        place = f"{self.source}:{node.start_mark.line + 1}"
        self.places.setdefault(path, place)
        self._spend(1, place)
        if len(path) > _DEEPEST:
            raise ConfigError(
                f"{place}: with every alias written out this is nested deeper than {_DEEPEST} levels (an anchor that "
                f"holds itself?): write out what is meant."
            )
        if isinstance(node, yaml.ScalarNode):
            self._count(node.value, _LONGEST_VALUE, "a value", place)
            return _scalar(node, place)
        if node.tag not in _NESTED_TAGS:
            raise ConfigError(f"{place}: the tag {_cut(node.tag)} has no meaning here: remove it.")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        return [self._convert(child, (*path, index)) for index, child in enumerate(node.value)]

    def _count(self, text: str, longest: int, what: str, place: str) -> None:
        """Refuse a text that is too long or that no file name or report could hold, or too many of them."""
        if len(text) > longest:
            raise ConfigError(f"{place}: {what} has {len(text):,} characters ({_cut(text)}); {longest:,} are the most.")
        if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text):
            raise ConfigError(f"{place}: {_cut(text)!r} holds a character that stands for none: remove it.")
        self._spend(len(text), place)

    def _spend(self, characters: int, place: str) -> None:
        """Count what the text comes to: no more with its aliases written out than a file may have."""
        self._characters += characters
        if self._characters > _MOST_BYTES:
            raise ConfigError(
                f"{place}: with every alias written out this is more than {_MOST_BYTES:,} characters: use fewer."
            )

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            place = f"{self.source}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{place}: a key is a list or a mapping; it must be a name.")
            # The text of the key and not its YAML value: the language code `no` is no boolean.
            key = str(key_node.value)
            self._count(key, _LONGEST_KEY, "a key", place)
            if key in values:
                raise ConfigError(
                    f"{place}: '{dotted((*path, key))}' is given twice, first at {self.places[(*path, key)]}. "
                    f"Remove one of the two."
                )
            self.places[(*path, key)] = place
            values[key] = self._convert(value_node, (*path, key))
        return values

    def join(self, key: str, base: Path) -> None:
        """Replace the file name at top-level `key` by what that file holds."""
        target = base / self.values[key]
        tree = Tree.read(target, named_at=self.place((key,)))
        self._forget((key,))
        self.values[key] = tree.values
        self.places[(key,)] = tree.source
        self.places.update({(key, *path): place for path, place in tree.places.items()})

    def below(self, *path: str) -> Tree:
        """What stands at `path`, as a tree of its own; an empty one where nothing does."""
        values: Any = self.values
        for key in path:
            values = values.get(key) if isinstance(values, dict) else None
        places = {known[len(path) :]: place for known, place in self.places.items() if known[: len(path)] == path}
        return Tree(self.place(path), {} if values is None else copy.deepcopy(values), places)

    def replace(self, key: str, value: Any, place: str) -> None:
        """Put a value in the place of whatever stands at a top-level key."""
        self._forget((key,))
        self.values[key] = value
        self.places[key,] = place

    def overlay(self, other: Tree) -> None:
        """Lay what another tree says over this one: a mapping key by key, anything else as a whole."""
        self.values = self._laid(self.values, other.values, other.places, ())

    def _laid(self, values: Any, over: Any, places: Mapping[KeyPath, str], path: KeyPath) -> Any:
        if not isinstance(values, dict) or not isinstance(over, dict):
            self._forget(path)
            self.places |= {known: place for known, place in places.items() if known[: len(path)] == path}
            return copy.deepcopy(over)
        for key, value in over.items():
            values[key] = self._laid(values.get(key), value, places, (*path, key))
        return values

    def override(self, text: str, joined: Sequence[str]) -> None:
        """Apply one `a.b=c`."""
        name, equals, value = text.partition("=")
        place, path = f"override '{_cut(text)}'", tuple(name.split("."))
        if not equals or not all(path):
            raise ConfigError(f"{place}: an override has the form a.b=value, as in train.total_tokens=1e6.")
        if len(path) > _DEEPEST:
            raise ConfigError(f"{place}: it names a key {len(path):,} levels deep; there are at most {_DEEPEST}.")
        if not isinstance(self.values, dict):
            return
        parent = self.values
        for depth, key in enumerate(path[:-1], start=1):
            child = parent.get(key)
            if child is not None and not isinstance(child, dict):
                kind = "a list; give it as a whole" if isinstance(child, list) else f"the single value {child!r}"
                raise ConfigError(f"{place}: '{dotted(path[:depth])}' is {kind}, so '{name}' does not exist.")
            if child is None:
                parent[key] = {}
                self.places[path[:depth]] = place
            parent = parent[key]
        self._forget(path)
        parent[path[-1]] = _override_value(value, place)
        self.places[path] = place
        if name in joined and isinstance(parent[name], str):
            self.join(name, Path())

    def _forget(self, path: KeyPath) -> None:
        self.places = {known: place for known, place in self.places.items() if known[: len(path)] != path}


def _text_of(path: Path, named_at: str) -> str:
    try:
        # Asked before it is opened: a pipe that nobody writes to would keep this process for ever.
        if stat.S_ISREG(path.stat().st_mode) or path.is_dir():
            with path.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
        else:
            raise OSError("it is no ordinary file")
    except (OSError, ValueError) as error:
        _refuse_file(path, named_at, error)
    if len(content) > _MOST_BYTES:
        raise ConfigError(
            f"{path}: a configuration has at most {_MOST_BYTES:,} bytes, and this file has more. Name a YAML file, or "
            f"divide it into one for each of model, data and cluster."
        )
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path}:{line}: the byte 0x{content[error.start]:02x} is not UTF-8: save the file in UTF-8."
        ) from None


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _refuse_file(path: Path, named_at: str, error: Exception) -> NoReturn:
    where = f"{named_at}: " if named_at else ""
    if isinstance(error, FileNotFoundError):
        siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{where}there is no file {os.path.normpath(path)}.{nearest(path.name, siblings)}")
    reason = "it is a directory" if isinstance(error, IsADirectoryError) else getattr(error, "strerror", None) or error
    raise ConfigError(f"{where}{path} cannot be read as a YAML file: {reason}.")


def _override_value(text: str, place: str) -> Any:
    if len(text) > _MOST_BYTES:
        raise ConfigError(f"{place}: the value has {len(text):,} characters; at most {_MOST_BYTES:,} are read.")
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: the value is not valid YAML: {getattr(error, 'problem', error)}.") from None
    return Tree(place, None)._convert(node, ()) if node else None


def _scalar(node: yaml.ScalarNode, place: str) -> Any:
    """The value of a scalar; whole numbers are ints however they are written (1e6, 1_000_000, 1.5e3)."""
    if node.style is None and node.tag in _PLAIN_TAGS and _NUMBER.fullmatch(node.value):
        number = node.value.replace("_", "")
        # Python refuses to read thousands of digits as an int; as a float they are infinite.
        return _whole(float(number)) if "." in number or "e" in number.lower() else _bounded(number)
    try:
        if node.tag not in _PLAIN_TAGS:
            raise ValueError(node.tag)
        value = _Loader("").construct_object(node)
    except (ValueError, LookupError, AttributeError, OverflowError):  # all of them the library's own slips
        kind = node.tag.removeprefix(_TAG)
        shown = _cut(node.tag if kind == node.tag else f"!!{kind}")
        raise ConfigError(
            f"{place}: '{_cut(node.value)}' is read as {'a date' if kind == 'timestamp' else shown} and is "
            f"none: correct it, or put it in quotes if it is a text."
        ) from None
    if node.tag == _TAG + "timestamp":
        return node.value  # no setting is a date, so that a name that looks like one is a name
    return float("inf") if isinstance(value, int) and abs(value) > _MOST_WHOLE else value


def _bounded(digits: str) -> int | float:
    return int(digits) if len(digits) < 19 or abs(float(digits)) < _MOST_WHOLE else float(digits)


def _whole(number: float) -> int | float:
    """An int where it is one of 64 bits."""
    return int(number) if abs(number) < _MOST_WHOLE and number == int(number) else number
