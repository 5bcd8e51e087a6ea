"""Dialogues as rows of an order: each is one, and counts as so many turns of the longest length that there may be."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.data.dialogues import DialogueManifest, DialogueSource
from rxt_dist.data.manifest import SourceInfo, SplitInfo, Totals
from rxt_dist.data.mixture import PhaseDataset


def dialogue_phase_dataset(path: Path, manifest: DialogueManifest, turns: int) -> PhaseDataset:
    """What phases read of a dataset of dialogues, of each of which `turns` count."""
    sources = tuple(_as_rows(source) for source in manifest.sources)
    return PhaseDataset(path, manifest.root_digest, turns * manifest.seq_len, manifest.tokenizer_sha256, sources)


def _as_rows(source: DialogueSource) -> SourceInfo:
    """A source of dialogues, each of which is a row."""
    train, held_out = (SplitInfo(Totals(rows=split.totals.dialogues)) for split in (source.train, source.eval))
    return SourceInfo(source.name, source.language, train, held_out)
