"""`rxt-dist data diff`."""

from __future__ import annotations

from pathlib import Path

import typer

from rxt_dist.commands.data.common import JSON, emit
from rxt_dist.errors import ExitCode


def diff(
    first: Path = typer.Argument(..., help="A dataset."),
    second: Path = typer.Argument(..., help="Another one."),
    as_json: bool = JSON,
) -> None:
    """Are two datasets the same stream of tokens? Exit code 0: the same; 65: different, with what differs.

    Compares the manifests, which takes no time at any size; `rxt-dist data verify` says whether the shards are what
    their manifest states. Example: `rxt-dist data diff data/here data/there`.
    """
    from dataclasses import asdict

    from data_prep.shards.difference import differences
    from rxt_dist.data.format import load_manifest

    ours, theirs = load_manifest(first), load_manifest(second)
    found = differences(ours, theirs)
    value = {
        "same": not found,
        "root_digests": [ours.root_digest, theirs.root_digest],
        "differences": [asdict(item) for item in found],
    }

    def show() -> None:
        if not found:
            print(f"{first} and {second} are the same stream: root digest {ours.root_digest}.")
            return
        print(f"{first} and {second} are different streams:")
        for item in found:
            print(f"  {item.what}: {item.first} | {item.second}")

    emit(as_json, value, show)
    if found:
        raise typer.Exit(ExitCode.DATA)
