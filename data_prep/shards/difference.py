"""Are two datasets the same stream of tokens, and if not, in what do they differ? Manifests are compared, no shards."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

from data_prep.shards.rows import unit_name
from rxt_dist.data.format import SPLITS, DatasetManifest, SplitInfo

_NAMED = 5
_Shard = tuple[str, int, str]


@dataclass(frozen=True)
class Difference:
    """`what` differs: its value in the one dataset and in the other, in words."""

    what: str
    first: str
    second: str


def differences(first: DatasetManifest, second: DatasetManifest) -> list[Difference]:
    """What decides the stream and differs; empty exactly where the root digests are equal.

    Inputs, settings and reports that lead to the same tokens are no difference.
    """
    if first.root_digest == second.root_digest:
        return []
    found = [
        Difference(what, str(a), str(b))
        for what, a, b in (
            ("row length", first.seq_len, second.seq_len),
            ("tokenizer", first.tokenizer_sha256[:16], second.tokenizer_sha256[:16]),
            ("ids of the vocabulary", first.vocab_size, second.vocab_size),
            ("version of the packing", first.packing_version, second.packing_version),
        )
        if a != b
    ]
    found += _sources(first, second)
    return found or [Difference("root digest", first.root_digest[:16], second.root_digest[:16])]


def _sources(first: DatasetManifest, second: DatasetManifest) -> Iterator[Difference]:
    ours, theirs = ({source.name: source for source in manifest.sources} for manifest in (first, second))
    if list(ours) != list(theirs):
        yield Difference("sources", ", ".join(ours) or "none", ", ".join(theirs) or "none")
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = ours[name], theirs[name]
        if a.language != b.language:
            yield Difference(f"language of {name}", a.language, b.language)
        for split in SPLITS:
            yield from _splits(f"{name}/{split}", a.split(split), b.split(split))


def _splits(name: str, first: SplitInfo, second: SplitInfo) -> Iterator[Difference]:
    """Totals that differ, then units that one side lacks, then units of which the rows differ."""
    a, b = asdict(first.totals), asdict(second.totals)
    for key, value in a.items():
        if value != b[key]:
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


def _units(split: SplitInfo) -> dict[str, list[_Shard]]:
    """Name, rows and hash of every shard, by unit, in order."""
    units: dict[str, list[_Shard]] = {}
    for shard in split.shards:
        units.setdefault(unit_name(shard), []).append((Path(shard.file).stem, shard.rows, shard.blake3))
    return units


def _shard(shard: _Shard | None) -> str:
    return f"{shard[0]} = {shard[2][:16]}..." if shard else "no more shards"


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
