"""The verification of a checkpoint, shared out over all ranks: each hashes mostly what it is going to read; or a load
that shows by itself whether it was sound."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import Tensor

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import rank_prefix
from rxt_dist.checkpoint.state import read_state
from rxt_dist.checkpoint.store import CHECKSUM, MANIFEST, Checkpoint, CheckpointStore, FileRecord, content_problems
from rxt_dist.engine.collectives import Collectives
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)


def described_together(group: Collectives, store: CheckpointStore, step: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of `step` if its manifest can be believed and its files are there with the recorded sizes, else
    None, and its problems; all ranks together. Nothing is hashed."""
    problems = group.together(lambda: store.verify(step, full=False) if group.rank == 0 else [])[0]
    if problems:
        return None, problems
    found: list[Checkpoint] = []

    def read() -> tuple[str, str]:
        try:
            found.append(store.read(step))
        except CheckpointError as error:  # Another host may see another folder.
            return "", str(error)
        return found[0].digest, ""

    of_ranks = group.together(read)
    problems = [problem for _, problem in of_ranks if problem]
    if not problems and len({digest for digest, _ in of_ranks}) > 1:
        problems = [f"{MANIFEST}: ranks see different ones, as those of a disk whose caches are of different times"]
    return (None if problems else found[0]), problems


def verify_together(group: Collectives, store: CheckpointStore, step: int) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint of `step` if every file of it has the recorded hash, else None, and its problems; all ranks
    together."""
    checkpoint, problems = described_together(group, store, step)
    if checkpoint is None:
        return None, problems
    share = share_of(checkpoint.files, group.rank, group.world_size)
    of_ranks = group.together(lambda: content_problems(checkpoint.path, share))
    problems = [problem for of_rank in of_ranks for problem in of_rank]
    _note(group, store, step, problems)
    return (None if problems else checkpoint), problems


def load_verified(
    engine: Engine, frozen: FrozenWeights, store: CheckpointStore, checkpoint: Checkpoint, optimizer_steps: int
) -> list[str]:
    """Fill the engine, and what is not trained, with a checkpoint, and see that it is what was saved; all ranks
    together.

    The checksum of the state, where it lies then, shows what hashes of the files would show, and that it lies in its
    place. Only if something is wrong are files hashed, for a name of the damage; if they are whole, it was wrong on its
    way here, and is read once more. A checkpoint of an older version is hashed first.

    Returns:
        What is wrong with the files; the engine then holds what nobody vouches for, and must be filled again before it
        is used.

    Raises:
        CheckpointError: as `load_state`, of a checkpoint whose files are as recorded.
    """
    problems: list[str] = []
    if CHECKSUM not in checkpoint.meta:
        problems = verify_together(engine.ranks, store, checkpoint.step)[1]
    routing = None if problems else _read(engine, frozen, checkpoint)
    if routing is None:
        problems = problems or verify_together(engine.ranks, store, checkpoint.step)[1]
        if problems:
            return problems
        routing = read_state(engine, frozen, checkpoint)
    _note(engine.ranks, store, checkpoint.step, ())
    engine.finish_load(optimizer_steps, routing)
    return []


def _read(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """See `read_state`; None if something is wrong."""
    try:
        return read_state(engine, frozen, checkpoint)
    except Exception as error:  # On all ranks, whichever met it.
        _LOGGER.warning("%s cannot be read (%s); looking at its files.", checkpoint.path, error)
        return None


def share_of(files: Sequence[FileRecord], rank: int, world_size: int) -> list[FileRecord]:
    """The files that a rank hashes: its own, and in turn of those that are nobody's; every file is one rank's."""
    owners = {rank_prefix(other): other for other in range(world_size)}
    # Of 'rank-00003-001.safetensors' the first ten characters name the rank.
    found = {file: owners.get(file.name[: len(rank_prefix(0))]) for file in files}
    shares = {file: owner for file, owner in found.items() if owner is not None}
    shares |= {file: turn % world_size for turn, file in enumerate(file for file in files if found[file] is None)}
    return [file for file in files if shares[file] == rank]


def _note(group: Collectives, store: CheckpointStore, step: int, problems: Sequence[str]) -> None:
    """Rank 0 prunes, and remembers what was found."""
    group.together(lambda: store.note(step, sound=not problems) if group.rank == 0 else None)
