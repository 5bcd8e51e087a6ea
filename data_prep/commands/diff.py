"""`rxt-dist data diff`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from data_prep.commands.common import JSON, emit, progress_bytes
from rxt_dist.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from data_prep.shards.documents import Sameness
    from rxt_dist.data.dialogues import AnyManifest


def diff(
    first: Path = typer.Argument(..., help="A dataset."),
    second: Path = typer.Argument(..., help="Another one."),
    documents: bool = typer.Option(
        False, "--documents", help="Read both, and compare the documents whatever rows they stand in."
    ),
    as_json: bool = JSON,
) -> None:
    """Are two datasets the same stream of tokens? Exit code 0: the same; 65: different, with what differs.

    Compares the manifests, which takes no time at any size; `rxt-dist data verify` says whether the shards are what
    their manifest states. Of different streams it says whether the documents are the same, as those of a repacked
    dataset are; where the manifests cannot tell, `--documents` reads the shards.
    Example: `rxt-dist data diff data/here data/there`.
    """
    from dataclasses import asdict

    from data_prep.shards.difference import differences
    from data_prep.shards.documents import compare_manifests
    from rxt_dist.data.dialogues import load_any_manifest
    from rxt_dist.data.manifest import DatasetManifest

    ours, theirs = load_any_manifest(first), load_any_manifest(second)
    found = differences(ours, theirs)
    same = compare_manifests((first, second), (ours, theirs))
    are_rows = isinstance(ours, DatasetManifest) and isinstance(theirs, DatasetManifest)
    if documents and found:
        same = _read((first, second), (ours, theirs))
    value = {
        "same": not found,
        "root_digests": [ours.root_digest, theirs.root_digest],
        "differences": [asdict(item) for item in found],
        "documents": asdict(same),
    }

    def show() -> None:
        if not found:
            print(f"{first} and {second} are the same stream: root digest {ours.root_digest}.")
            return
        print(f"{first} and {second} are different streams:")
        for item in found:
            print(f"  {item.what}: {item.first} | {item.second}")
        print(_said(same, are_rows))

    emit(as_json, value, show)
    if found:
        raise typer.Exit(ExitCode.DATA)


def _read(roots: tuple[Path, Path], manifests: tuple[AnyManifest, AnyManifest]) -> Sameness:
    from data_prep.shards.documents import compare_documents
    from rxt_dist.data.manifest import DatasetManifest

    ours, theirs = manifests
    if not isinstance(ours, DatasetManifest) or not isinstance(theirs, DatasetManifest):
        dialogues = roots[1] if isinstance(ours, DatasetManifest) else roots[0]
        raise ConfigError(
            f"--documents compares the documents of rows, but {dialogues} holds dialogues: leave it out, and the "
            f"manifests are compared."
        )
    if ours.tokenizer_sha256 != theirs.tokenizer_sha256:
        raise ConfigError("--documents compares ids, but the two datasets have different tokenizers: leave it out.")
    with progress_bytes("Comparing") as progress:
        return compare_documents(roots, (ours, theirs), progress)


def _said(same: Sameness, are_rows: bool) -> str:
    """What is known of the documents, in a sentence; `are_rows` says that both can be read for more."""
    where = ", ".join(same.differing[:5]) + (", ..." if len(same.differing) > 5 else "")
    if same.by == "tokenizer":
        return "Their tokenizers differ, so that their documents cannot be compared."
    if same.by == "origin":
        return "The documents are the same: one was repacked from the other, or both from a third."
    if same.by == "digest" and same.same:
        return "The documents are the same in every source and split: all were read and compared, whatever their order."
    if same.differing:
        return f"The documents are not the same ones: they differ in {where}."
    known = (
        "In every source and split there are as many documents and tokens. Whether they are the same ones the "
        "manifests do not say"
    )
    return f"{known}: --documents reads both." if are_rows else f"{known}."
