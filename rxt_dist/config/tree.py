"""YAML read as plain values that remember the file and line of each, with other files joined and overrides applied."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Self

import yaml

from rxt_dist.errors import ConfigError, nearest

KeyPath = tuple[str | int, ...]

# YAML 1.1 takes 1e6 and 4.0e9 for text; a person means numbers.
_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


def dotted(path: KeyPath) -> str:
    """`("train", "lr")` as `train.lr`."""
    return ".".join(str(part) for part in path)


@dataclass
class Tree:
    """Plain values, and where each of them was written."""

    source: str
    values: Any
    places: dict[KeyPath, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, named_at: str = "") -> Self:
        """Read one YAML file; `named_at` says where another file names it."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            _refuse_file(path, named_at, error)
        tree = cls(os.path.normpath(path), None)
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
            tree.values = tree._convert(node, ()) if node else {}
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            raise ConfigError(f"{path}:{line}: this is not valid YAML: {error.problem or error.context}.") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: this is not valid YAML: {error}.") from None
        return tree

    def place(self, path: KeyPath) -> str:
        """Where the value at `path`, or the nearest mapping around it, was written."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, self.source)

    def _convert(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places.setdefault(path, f"{self.source}:{node.start_mark.line + 1}")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._convert(child, (*path, index)) for index, child in enumerate(node.value)]
        return _scalar(node)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            # The text of the key and not its YAML value: the language code `no` is no boolean.
            key = str(key_node.value)
            place = f"{self.source}:{key_node.start_mark.line + 1}"
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

    def override(self, text: str, joined: Sequence[str]) -> None:
        """Apply one `a.b=c`."""
        name, equals, value = text.partition("=")
        place, path = f"override '{text}'", tuple(name.split("."))
        if not equals or not all(path):
            raise ConfigError(f"{place}: an override has the form a.b=value, as in train.total_tokens=1e6.")
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


def _refuse_file(path: Path, named_at: str, error: Exception) -> NoReturn:
    where = f"{named_at}: " if named_at else ""
    if isinstance(error, FileNotFoundError):
        siblings = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ConfigError(f"{where}there is no file {os.path.normpath(path)}.{nearest(path.name, siblings)}")
    reason = "it is a directory" if isinstance(error, IsADirectoryError) else str(error)
    raise ConfigError(f"{where}{path} cannot be read as a YAML file: {reason}.")


def _override_value(text: str, place: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return Tree(place, None)._convert(node, ()) if node else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: the value is not valid YAML: {getattr(error, 'problem', error)}.") from None


def _scalar(node: yaml.Node) -> Any:
    """The value of a scalar; whole numbers are ints however they are written (1e6, 1_000_000, 1.5e3)."""
    plain = isinstance(node, yaml.ScalarNode) and node.style is None
    if plain and _NUMBER.fullmatch(node.value):
        number = node.value.replace("_", "")
        return int(number) if number.lstrip("+-").isdigit() else _whole(float(number))
    loader = yaml.SafeLoader("")
    return loader.construct_object(node)


def _whole(number: float) -> int | float:
    return int(number) if math.isfinite(number) and number == int(number) else number
