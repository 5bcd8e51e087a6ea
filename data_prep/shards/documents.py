"""Do two datasets hold the same documents, in whatever rows? From where they come, from their totals, or by reading."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from data_prep.building.folder import SPEC_FILE
from data_prep.shards.repack import documents_by_window
from data_prep.shards.rows import unit_name
from data_prep.shards.trace import read_json
from rxt_dist.data.dialogues import AnyManifest
from rxt_dist.data.manifest import SPLITS, DatasetManifest, ShardInfo, digest_json
from rxt_dist.data.origin import REPACK, maker
from rxt_dist.errors import DataError

_DIGESTS = 1 << 128

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Sameness:
    """Whether the documents are the same; None: that is not known. `by` is what tells it, and `differing` names the
    sources and splits in which they are others."""

    same: bool | None
    by: Literal["stream", "origin", "totals", "tokenizer", "digest"]
    differing: tuple[str, ...] = ()


def compare_manifests(roots: tuple[Path, Path], manifests: tuple[AnyManifest, AnyManifest]) -> Sameness:
    """What can be told without reading a shard.

    Raises:
        DataError: the settings of a repacked dataset are damaged.
    """
    first, second = manifests
    if first.root_digest == second.root_digest:
        return Sameness(True, "stream")
    if first.tokenizer_sha256 != second.tokenizer_sha256:
        return Sameness(None, "tokenizer")
    # Repacking keeps every document of every source and split.
    ours, theirs = (_lineage(root, manifest) for root, manifest in zip(roots, manifests, strict=True))
    if ours & theirs:
        return Sameness(True, "origin")
    differing = _differing(*(_totals(manifest) for manifest in manifests))
    return Sameness(False if differing else None, "totals", differing)


def compare_documents(
    roots: tuple[Path, Path],
    manifests: tuple[DatasetManifest, DatasetManifest],
    progress: Progress = lambda done, total: None,
) -> Sameness:
    """Read both and compare, source by source and split by split, the sum of the hashes of their documents' ids.

    Args:
        progress: told bytes of shards done and in all.

    Raises:
        DataError: a damaged shard.
    """
    total, done = sum(shard.bytes for manifest in manifests for shard in manifest.shards()), 0

    def on_bytes(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    digests = [_digests(root, manifest, on_bytes) for root, manifest in zip(roots, manifests, strict=True)]
    differing = _differing(*digests)
    return Sameness(not differing, "digest", differing)


def _lineage(root: Path, manifest: AnyManifest) -> set[str]:
    """The root digests of the dataset and, if it was repacked, of the one it was made from."""
    if not isinstance(manifest, DatasetManifest) or maker(root) != REPACK:
        return {manifest.root_digest}
    settings = read_json(root / SPEC_FILE)
    if digest_json(settings) != manifest.spec_hash:
        raise DataError(
            f"{root / SPEC_FILE} is not what the dataset was made with. `rxt-dist data verify {root} --repair` "
            f"restores it."
        )
    return {manifest.root_digest, str(settings["repacked_from"])}


def _totals(manifest: AnyManifest) -> dict[str, tuple[int, ...]]:
    found = {}
    for source in manifest.sources:
        for split in SPLITS:
            totals = source.split(split).totals
            counts = ("documents", "dialogues", "turns", "tokens")
            found[f"{source.name}/{split}"] = tuple(vars(totals).get(name, 0) for name in counts)
    return found


def _digests(root: Path, manifest: DatasetManifest, on_bytes: Callable[[int], None]) -> dict[str, tuple[int, ...]]:
    """For each source and split the sum of the 128-bit hashes of its documents."""
    found: dict[str, tuple[int, ...]] = {}
    for source in manifest.sources:
        for split in SPLITS:
            digest = 0
            for _, group in groupby(source.split(split).shards, key=unit_name):
                shards: tuple[ShardInfo, ...] = tuple(group)
                for _, lengths, tokens in documents_by_window(root, shards, manifest.seq_len):
                    for document in np.split(tokens, np.cumsum(lengths)[:-1]):
                        digest = (digest + xxhash.xxh3_128_intdigest(document.data)) % _DIGESTS
                on_bytes(sum(shard.bytes for shard in shards))
            found[f"{source.name}/{split}"] = (digest,)
    return found


def _differing(first: dict[str, tuple[int, ...]], second: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Names with other values; one that is not there has as many as nothing."""
    names = sorted({*first, *second})
    nothing = tuple(0 for _ in next(iter({**first, **second}.values()), ()))
    return tuple(name for name in names if first.get(name, nothing) != second.get(name, nothing))
