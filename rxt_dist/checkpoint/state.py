"""The training state of an engine as files, independent of ranks, ZeRO stage and expert parallelism.

Every rank writes the pieces that it holds, named `kind|parameter|offset`: a float32 run of the flattened parameter (or
of one of its moments) and where it begins. A load asks, for each piece that the loading rank holds, which saved pieces
overlap it. So no rank ever holds more than its own share, nothing is converted when the number of ranks changes, and a
one-process run reads what 64 GPUs wrote.

A checksum over the bits of all weights and moments, weighed by their place, is kept in the manifest and compared after
every load: it would notice a piece that went to the wrong place, which file hashes cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rxt_dist.checkpoint.daemons import map_on_daemons
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import ROUTING_FILE, SavedPieces, rank_prefix
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore, FileRecord
from rxt_dist.checkpoint.writing import Share, wrapped, writing_errors
from rxt_dist.engine.interface import Engine, Fragment
from rxt_dist.errors import CheckpointError

# Pieces that a rank copies out of the files at once.
_THREADS = 4


def save_state(
    engine: Engine, frozen: FrozenWeights, store: CheckpointStore, step: int, meta: Mapping[str, Any]
) -> Path:
    """Write and commit a checkpoint of all parts, trained and frozen, while training waits; all ranks together.

    Nothing is copied: the files are written from the engine's own tensors.

    Args:
        meta: what else a load needs (JSON values); `checksum` is added here.

    Raises:
        DiskError, CheckpointError: on all ranks when any rank failed; nothing is committed then.
    """
    ranks = engine.ranks
    share = own_share(engine, frozen)

    def together(action: Callable[[], Any]) -> list[Any]:
        return ranks.together(lambda: writing_errors(ranks.rank, action))

    needed = sum(ranks.gather(share.bytes))
    try:
        together(lambda: begin(store, step, needed) if ranks.rank == 0 else None)
        parts = together(lambda: [[asdict(record) for record in share.write(store, step)], share.checksum()])
        files = [FileRecord(**record) for records, _ in parts for record in records]
        complete = {**meta, "checksum": wrapped(sum(checksum for _, checksum in parts))}
        together(lambda: str(store.commit(step, files, complete)) if ranks.rank == 0 else None)
    except Exception:
        if ranks.rank == 0:
            store.discard(step)
        raise
    return store.folder(step)


def own_share(engine: Engine, frozen: FrozenWeights) -> Share:
    """What this rank saves, as views of the engine's tensors."""
    fragments = (*engine.fragments(owned=True), *frozen.fragments())
    return Share(engine.ranks.rank, fragments, engine.routing_state())


def begin(store: CheckpointStore, step: int, needed: int) -> None:
    """Make the folder of a save, if the disk has room for `needed` bytes; rank 0."""
    store.begin(step)
    store.require_space(needed + needed // 20)


def load_state(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint, optimizer_steps: int) -> None:
    """Fill the engine, and what is not trained, with a verified checkpoint; all ranks together.

    Raises:
        CheckpointError: a parameter or a part of one is missing, the checkpoint has parameters that the model lacks,
            or the loaded state is not the saved one.
    """
    routing: dict[str, Tensor] = {}

    def read() -> None:
        _fill(engine, frozen, checkpoint)
        with safe_open(checkpoint.path / ROUTING_FILE, "pt") as file:
            routing.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

    engine.ranks.together(read)
    engine.finish_load(optimizer_steps, routing)
    if (found := state_checksum(engine, frozen)) != checkpoint.meta["checksum"]:
        raise CheckpointError(
            f"The state loaded from {checkpoint.path} has checksum {found}, but {checkpoint.meta['checksum']} was "
            "saved: weights or moments went to the wrong place. This is a fault of the program; please report it."
        )


def _fill(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint) -> None:
    """Fill this rank's fragments; refuses parameters that the model lacks in the files that it has opened."""
    saved = SavedPieces(checkpoint, own=rank_prefix(engine.ranks.rank))

    def fill(fragment: Fragment) -> None:
        with torch.no_grad():  # It belongs to a thread.
            for kind, tensor in fragment.tensors.items():
                saved.fill(kind, fragment.name, fragment.start, tensor)

    map_on_daemons(fill, (*engine.fragments(owned=False), *engine.frozen_fragments(), *frozen.fragments()), _THREADS)
    surplus = sorted(saved.names_so_far - frozen.model_names)
    if surplus:
        raise CheckpointError(
            f"Checkpoint {checkpoint.path} holds '{surplus[0]}' and {len(surplus) - 1} more parameters that model and "
            "stage of this run do not have. Resume it with the configuration that it was written with."
        )


def state_checksum(engine: Engine, frozen: FrozenWeights) -> int:
    """The checksum of the whole state (see `Share.checksum`); all ranks together."""
    return wrapped(sum(engine.ranks.gather(own_share(engine, frozen).checksum())))
