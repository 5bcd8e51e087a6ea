"""What a dataset folder is and which command made it: for messages that say so, or what to run again.

Only hints are made of this, so `build.json` is believed as it stands; `verify` says whether it is sound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DIALOGUES_FORMAT = "rxt-dialogues"

BUILD, REPACK = "rxt-dist data build", "rxt-dist data repack"
INTERACTIONS, IMPORT = "rxt-dist data interactions", "rxt-dist data import-megatron"

_SPEC_FILE = "build.json"
_OF_FORMAT = {"interactions": INTERACTIONS, "megatron-import": IMPORT}


def maker(root: Path) -> str:
    """The command that made a folder, or began to: that of its `build.json`; `rxt-dist data build` without one."""
    try:
        spec = json.loads((root / _SPEC_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return BUILD
    if not isinstance(spec, dict):
        return BUILD
    return REPACK if "repacked_from" in spec else _OF_FORMAT.get(str(spec.get("format")), BUILD)


def mending(root: Path) -> str:
    """What to do about damaged files of a dataset."""
    repair = f"`rxt-dist data verify {root} --repair` restores the small files from their copies"
    if keeps_plan(root):
        return f"{repair} and builds damaged shards again from their texts."
    return f"{repair}; {rebuilding(root)}."


def rebuilding(root: Path) -> str:
    """How what `verify --repair` cannot mend is made again, as a clause."""
    again = f"run the same `{maker(root)}` again"
    if keeps_plan(root):
        return (
            f"{again}, which writes anew whatever it can still make from the finished units; for shards, put the "
            f"inputs back where they were and repair again"
        )
    return f"delete what is damaged of its shards and {again}, which writes them anew"


def keeps_plan(root: Path) -> bool:
    """Whether the folder leads back to what its shards were made from: to texts, or to the dataset of a repacking."""
    return maker(root) in (BUILD, REPACK)


def refusal(root: Path, manifest: Mapping[str, Any], wanted: str) -> str:
    """Why a folder whose `dataset.json` is of another kind cannot be read; `wanted` names the format that can."""
    if manifest.get("format") == DIALOGUES_FORMAT:
        return (
            f"{root} holds dialogues, made for the memory stages by `rxt-dist data interactions --kind dialogues`, but "
            f"rows are read here. Of dialogues there are `rxt-dist data verify` and `data diff`; their counts stand in "
            f"{root / 'interactions.json'}. Name a dataset that `rxt-dist data build` made."
        )
    return (
        f"{root / 'dataset.json'} has format {manifest.get('format')!r} version {manifest.get('version')!r}; this "
        f"program reads {wanted} here. Name a dataset of this format, or build it again with this version."
    )
