"""What the sections found so far, as one JSON file and one Markdown page, written anew after every row.

A run that is cut off at any moment leaves behind all that it had measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rxt_dist.files import write_atomic

JSON_NAME, MARKDOWN_NAME = "gpu.json", "gpu.md"
RUNNING, DONE, FAILED, SKIPPED = "running", "done", "failed", "skipped"
_HEADING = "# What a GPU says\n\nWritten by `benchmarks/gpu.py`; docs/gpu.md says how to read it."


class Report:
    """The findings of all sections, in their order; read again by every process that adds to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / JSON_NAME
        self.content: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"facts": {}, "sections": {}}

    def fact(self, name: str, value: Any) -> None:
        """Something that later sections and readers need, by name."""
        self.content["facts"][name] = value
        self.write()

    def begin(self, name: str, title: str) -> None:
        """A section starts; what an earlier try of it left is dropped."""
        self.content["sections"][name] = {"title": title, "status": RUNNING, "rows": [], "notes": []}
        self.write()

    def row(self, name: str, **cells: Any) -> None:
        """A line of a section's table."""
        self.content["sections"][name]["rows"].append(cells)
        self.write()

    def note(self, name: str, text: str) -> None:
        """A sentence below a section's table."""
        self.content["sections"][name]["notes"].append(text)
        self.write()

    def end(self, name: str, title: str, status: str, why: str = "", seconds: float = 0.0) -> None:
        """A section is over. `why`: what went wrong, or why it was not begun."""
        section = self.content["sections"].setdefault(name, {"title": title, "rows": [], "notes": []})
        section |= {"status": status, "why": why, "seconds": round(seconds, 1)}
        self.write()

    def status(self, name: str) -> str:
        """Of a section; empty if it never began."""
        found: str = self.content["sections"].get(name, {}).get("status", "")
        return found

    def write(self) -> None:
        """Both files, each whole."""
        write_atomic(self.folder / JSON_NAME, json.dumps(self.content, indent=1))
        write_atomic(self.folder / MARKDOWN_NAME, self.markdown())

    def markdown(self) -> str:
        """All of it as a page."""
        parts = [_HEADING, _table([{"what": key, "value": value} for key, value in self.content["facts"].items()])]
        for name, section in self.content["sections"].items():
            parts.append(f"## {name}: {section['title']}")
            if section["status"] != DONE:
                parts.append(f"**{section['status']}**: {section.get('why', '')}".rstrip(": "))
            parts += [_table(section["rows"]), *(f"- {note}" for note in section["notes"])]
        return "\n\n".join(part for part in parts if part) + "\n"


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
        return f"{value:,.{digits}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).replace("|", "/")
