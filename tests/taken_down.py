"""Which processes end by Python's own end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def note_who_is_taken_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file into which every process writes its rank when Python takes its modules down."""
    notes, modules = folder / "taken-down", folder / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(
        "import os\n"
        f"FILE = {str(notes)!r}, os.O_CREAT | os.O_APPEND | os.O_WRONLY\n"
        "class Witness:\n"
        "    def __del__(self, rank=os.environ.get('RANK'), file=FILE, open=os.open, write=os.write):\n"
        "        write(open(*file), f'{rank}\\n'.encode())\n"
        "witness = Witness()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(modules), prepend=os.pathsep)
    return notes
