"""The verification of a checkpoint, shared out over all ranks: each hashes mostly what it is going to read."""

from __future__ import annotations

from collections.abc import Sequence

from rxt_dist.checkpoint.pieces import rank_prefix
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore, FileRecord, content_problems
from rxt_dist.engine.collectives import Collectives
from rxt_dist.errors import CheckpointError


def verify_together(group: Collectives, store: CheckpointStore, step: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of `step` if every file of it has the recorded hash, else None, and its problems; all ranks
    together."""
    problems = group.together(lambda: store.verify(step, full=False) if group.rank == 0 else [])[0]
    if problems:
        return None, problems

    found: list[Checkpoint] = []

    def hash_share() -> list[str]:
        try:
            found.append(store.read(step))
        except CheckpointError as error:  # Another host may see another folder.
            return [str(error)]
        return content_problems(found[0].path, share_of(found[0].files, group.rank, group.world_size))

    problems = [problem for of_rank in group.together(hash_share) for problem in of_rank]
    if group.rank == 0:
        store.note(step, sound=not problems)
    return (None if problems else found[0]), problems


def share_of(files: Sequence[FileRecord], rank: int, world_size: int) -> list[FileRecord]:
    """The files that a rank hashes: its own, and in turn of those that are nobody's; every file is one rank's."""
    owners = {rank_prefix(other): other for other in range(world_size)}
    # Of 'rank-00003-001.safetensors' the first ten characters name the rank.
    found = {file: owners.get(file.name[: len(rank_prefix(0))]) for file in files}
    shares = {file: owner for file, owner in found.items() if owner is not None}
    shares |= {file: turn % world_size for turn, file in enumerate(file for file in files if found[file] is None)}
    return [file for file in files if shares[file] == rank]
