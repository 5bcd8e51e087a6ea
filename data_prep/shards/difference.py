"""Are two datasets the same stream of tokens, and if not, in what do they differ? Manifests are compared, no shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from data_prep.shards.rows import unit_name
from rxt_dist.data.dialogues import AnyManifest, DialogueManifest, DialogueShard, DialogueSplit
from rxt_dist.data.manifest import SPLITS, SplitInfo
from rxt_dist.data.rows import INTERACTION_BOUNDARIES

_NAMED = 5
_Shard = tuple[str, int, str]
AnySplit = SplitInfo | DialogueSplit


@dataclass(frozen=True)
class Difference:
    """`what` differs: its value in the one dataset and in the other, in words."""

    what: str
    first: str
    second: str


def differences(first: AnyManifest, second: AnyManifest) -> list[Difference]:
    """What decides the stream and differs; empty exactly where the root digests are equal.

    Inputs, settings and reports that lead to the same tokens are no difference.
    """
    if first.root_digest == second.root_digest:
        return []
    ours, theirs = _settings(first), _settings(second)
    if isinstance(first, DialogueManifest) != isinstance(second, DialogueManifest):
        return [Difference("kind", str(ours["kind"]), str(theirs["kind"]))]
    found = [
        Difference(what, str(ours[what]), str(theirs[what]))
        for what in ours
        if what in theirs and ours[what] != theirs[what]
    ]
    found += _sources(first, second)
    return found or [Difference("root digest", first.root_digest[:16], second.root_digest[:16])]


def _settings(manifest: AnyManifest) -> dict[str, str | int]:
    common: dict[str, str | int] = {
        "row length": manifest.seq_len,
        "tokenizer": manifest.tokenizer_sha256[:16],
        "ids of the vocabulary": manifest.vocab_size,
    }
    if isinstance(manifest, DialogueManifest):
        return {**common, "kind": "dialogues", "template": manifest.template}
    is_interactions = manifest.boundaries == INTERACTION_BOUNDARIES
    common["kind"] = "single interactions" if is_interactions else "documents"
    return {**common, "version of the packing": manifest.packing_version}


def _sources(first: AnyManifest, second: AnyManifest) -> Iterator[Difference]:
    ours, theirs = ({source.name: source for source in manifest.sources} for manifest in (first, second))
    if list(ours) != list(theirs):
        yield Difference("sources", ", ".join(ours) or "none", ", ".join(theirs) or "none")
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.language != b.language:
            yield Difference(f"language of {name}", a.language, b.language)
        for split in SPLITS:
            yield from _splits(f"{name}/{split}", a.split(split), b.split(split))


def _splits(name: str, first: AnySplit, second: AnySplit) -> Iterator[Difference]:
    """Totals that differ, then units that one side lacks, then units of which the rows differ."""
    a, b = asdict(first.totals), asdict(second.totals)
    for key, value in a.items():
        if key in b and value != b[key]:
            yield Difference(f"{key.replace('_', ' ')} of {name}", f"{value:,}", f"{b[key]:,}")
    ours, theirs = _units(first), _units(second)
    lacking = [sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())]
    if any(lacking):
        yield Difference(f"units of {name}", *(f"lacks {_some(names)}" if names else "has all" for names in lacking))
    shared = [unit for unit in ours if unit in theirs]
    other = [unit for unit in shared if ours[unit] != theirs[unit]]
    if other:
        what = f"rows of {len(other)} of {len(shared)} units of {name}"
        pairs = zip_longest(ours[other[0]], theirs[other[0]])
        differing = next(pair for pair in pairs if pair[0] != pair[1])
        yield Difference(what, *(f"{_some(other)}; {_shard(shard)}" for shard in differing))
    elif list(ours) != list(theirs) and not any(lacking):
        yield Difference(f"order of the units of {name}", _some(list(ours)), _some(list(theirs)))


def _units(split: AnySplit) -> dict[str, list[_Shard]]:
    """Name, rows and hash of every shard, by unit, in order."""
    units: dict[str, list[_Shard]] = {}
    for shard in split.shards:
        rows = shard.dialogues if isinstance(shard, DialogueShard) else shard.rows
        units.setdefault(unit_name(shard), []).append((Path(shard.file).stem, rows, shard.blake3))
    return units


def _shard(shard: _Shard | None) -> str:
    return f"{shard[0]} = {shard[2][:16]}..." if shard else "no more shards"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
