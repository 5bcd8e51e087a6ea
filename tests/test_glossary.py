"""docs/glossary.md and the code: every shape suffix is in its legend, every place that it names is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
LEGEND = re.findall(r"^\| `(\w)` \|", PAGE, re.MULTILINE)
# `hidden_BTD`, `weight_C1`, `q_BTHd`; names of constants and types begin with a capital.
SUFFIX = re.compile(r"_?[a-z][A-Za-z0-9_]*_([A-Z][A-Z0-9d]*)")


def names(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg):
            yield node.arg


def unknown_suffixes(source: str) -> set[str]:
    """Names with a suffix that has a letter of no meaning."""
    found = {name: match[1] for name in names(source) if (match := SUFFIX.fullmatch(name))}
    return {name for name, suffix in found.items() if not set(re.sub(r"\d", "", suffix)) <= set(LEGEND)}


def test_every_letter_has_one_meaning_and_every_suffix_such_letters() -> None:
    assert len(LEGEND) == len(set(LEGEND)) > 20
    files = [path for room in ("rxt_dist", "data_prep", "launch") for path in (ROOT / room).rglob("*.py")]
    unknown = {path.relative_to(ROOT).as_posix(): unknown_suffixes(path.read_text("utf-8")) for path in files}
    assert {path: found for path, found in unknown.items() if found} == {}


def test_a_letter_without_a_meaning_is_found() -> None:
    source = "def f(self, x_BTQ, mask_BT, q_BTHd, weight_C1):\n    self.bad_Q = x_BTQ\n    return UPPER_Q"
    assert unknown_suffixes(source) == {"x_BTQ", "bad_Q"}


def test_every_place_is_there() -> None:
    places = re.findall(r"`((?:rxt_dist|data_prep|launch)/[\w/.]*)`", PAGE)
    assert len(places) > 30
    assert [place for place in places if not (ROOT / place).exists()] == []
