"""`rxt-dist data verify`."""

from __future__ import annotations

from pathlib import Path

from rxt_dist.commands.data.common import DATASET, JSON, emit, progress_bytes
from rxt_dist.errors import DataError


def verify(dataset: Path = DATASET, as_json: bool = JSON) -> None:
    """Hash every file of a dataset and name each damaged one; exit code 65 if there is any.

    Example: `rxt-dist data verify data/mine`. Training does the same for each shard before it reads from it.
    """
    from rxt_dist.data.dataset import verify_dataset
    from rxt_dist.data.format import load_manifest

    manifest = load_manifest(dataset)
    total, done = sum(shard.bytes for shard in manifest.shards()), 0
    with progress_bytes("Verifying") as progress:

        def on_shard(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        damaged = verify_dataset(dataset, lambda shard: on_shard(shard.bytes))
    count = sum(1 for _ in manifest.shards())
    value = {
        "dataset": str(dataset),
        "shards": count,
        "bytes": total,
        "root_digest": manifest.root_digest,
        "damaged": dict(damaged),
    }

    def show() -> None:
        if not damaged:
            print(f"{dataset} is sound: {count} shards, {total / 1e6:.1f} MB, root digest {manifest.root_digest}.")

    emit(as_json, value, show)
    if damaged:
        files = "; ".join(f"{name} {problem}" for name, problem in damaged)
        raise DataError(
            f"{dataset} has {len(damaged)} damaged file{'s' * (len(damaged) > 1)}: {files}. Delete what is named and "
            f"run the same `rxt-dist data build` again: it rebuilds exactly the missing units."
        )
