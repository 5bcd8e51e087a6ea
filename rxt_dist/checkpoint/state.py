"""The training state of an engine as files, independent of ranks, ZeRO stage and expert parallelism.

Every rank writes the pieces that it holds, named `kind|parameter|offset`: a float32 run of the flattened parameter (or
of one of its moments) and where it begins. A load asks, for each piece that the loading rank holds, which saved pieces
overlap it. So no rank ever holds more than its own share, nothing is converted when the number of ranks changes, and a
one-process run reads what 64 GPUs wrote.

A checksum over the bits of all weights and moments, weighed by their place, is kept in the manifest and compared after
every load: it would notice a piece that went to the wrong place, which file hashes cannot.
"""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import ROUTING_FILE, SavedPieces, rank_file
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore, FileRecord
from rxt_dist.checkpoint.tensor_file import write_tensors
from rxt_dist.engine.interface import Engine, Fragment
from rxt_dist.errors import CheckpointError, DiskError, UserError

# Elements of a piece that are checksummed at once; bounds the temporary memory to a few tens of megabytes.
_CHECKSUM_ELEMENTS = 1 << 20


def save_state(
    engine: Engine, frozen: FrozenWeights, store: CheckpointStore, step: int, meta: Mapping[str, Any]
) -> Path:
    """Write and commit a checkpoint of all parts, trained and frozen; all ranks together.

    Args:
        meta: what else a load needs (JSON values); `checksum` is added here.

    Raises:
        DiskError, CheckpointError: on all ranks when any rank failed; nothing is committed then.
    """
    ranks = engine.ranks
    owned = _owned(engine, frozen)
    local_bytes = sum(t.numel() * t.element_size() for fragment in owned for t in fragment.tensors.values())
    needed = sum(ranks.gather(local_bytes))
    _together(engine, lambda: _begin(store, step, needed) if ranks.rank == 0 else None)
    records = _together(engine, lambda: [asdict(record) for record in _write(engine, frozen, store, step)])
    checksum = state_checksum(engine, frozen)
    files = [FileRecord(**record) for of_rank in records for record in of_rank]

    def commit() -> None:
        if ranks.rank == 0:
            store.commit(step, files, {**meta, "checksum": checksum})

    _together(engine, commit)
    return store.folder(step)


def load_state(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint, optimizer_steps: int) -> None:
    """Fill the engine, and what is not trained, with a verified checkpoint; all ranks together.

    Raises:
        CheckpointError: a parameter or a part of one is missing, the checkpoint has parameters that the model lacks,
            or the loaded state is not the saved one.
    """
    engine.ranks.together(lambda: _fill(engine, frozen, checkpoint))
    with safe_open(checkpoint.path / ROUTING_FILE, "pt") as file:
        engine.finish_load(optimizer_steps, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    if (found := state_checksum(engine, frozen)) != checkpoint.meta["checksum"]:
        raise CheckpointError(
            f"The state loaded from {checkpoint.path} has checksum {found}, but {checkpoint.meta['checksum']} was "
            "saved: weights or moments went to the wrong place. This is a fault of the program; please report it."
        )


@torch.no_grad()
def _fill(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint) -> None:
    """Fill this rank's fragments; refuses parameters that the model lacks in the files that it has opened."""
    saved = SavedPieces(checkpoint, own=rank_file(engine.ranks.rank))
    for fragment in (*engine.fragments(owned=False), *engine.frozen_fragments(), *frozen.fragments()):
        for kind, tensor in fragment.tensors.items():
            saved.fill(kind, fragment.name, fragment.start, tensor)
    surplus = sorted(saved.names_so_far - frozen.model_names)
    if surplus:
        raise CheckpointError(
            f"Checkpoint {checkpoint.path} holds '{surplus[0]}' and {len(surplus) - 1} more parameters that model and "
            "stage of this run do not have. Resume it with the configuration that it was written with."
        )


def state_checksum(engine: Engine, frozen: FrozenWeights) -> int:
    """Sum over all weights and moments of bits * place, modulo 2^64: equal for equal state on any topology."""
    total = torch.zeros((), dtype=torch.int64, device=engine.device)
    for fragment in _owned(engine, frozen):
        for kind, tensor in fragment.tensors.items():
            key = zlib.crc32(f"{kind}|{fragment.name}".encode()) | 1
            for first in range(0, tensor.numel(), _CHECKSUM_ELEMENTS):
                bits = tensor.detach()[first : first + _CHECKSUM_ELEMENTS].view(torch.int32).to(torch.int64)
                start = fragment.start + first
                place = torch.arange(start, start + bits.numel(), dtype=torch.int64, device=bits.device)
                # int64 products and sums wrap around, which is what a checksum wants.
                total += ((bits * (place * 2 + 1)).sum() * key).to(total.device)
    return int(engine.ranks.sum(total).item())


def _owned(engine: Engine, frozen: FrozenWeights) -> Iterator[Fragment]:
    """Everything that this rank saves."""
    yield from engine.fragments(owned=True)
    yield from frozen.fragments()


def _begin(store: CheckpointStore, step: int, needed: int) -> None:
    store.begin(step)
    store.require_space(needed + needed // 20)


def _write(engine: Engine, frozen: FrozenWeights, store: CheckpointStore, step: int) -> list[FileRecord]:
    folder = store.unfinished_folder(step)
    views = {
        f"{kind}|{fragment.name}|{fragment.start}": tensor
        for fragment in _owned(engine, frozen)
        for kind, tensor in fragment.tensors.items()
    }
    path = folder / rank_file(engine.ranks.rank)
    records = [store.record(path, write_tensors(path, views))]
    if engine.ranks.rank == 0:
        routing = folder / ROUTING_FILE
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in engine.routing_state().items()}, routing
        )
        records.append(store.record(routing))
    return records


def _together(engine: Engine, action: Callable[[], Any]) -> list[Any]:
    """`Collectives.together` for writing: what the system or a library says of it becomes an error for a person."""

    def write() -> Any:
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            # Libraries report a full disk in exceptions of their own.
            text = f"Writing the checkpoint failed on rank {engine.ranks.rank}: {type(error).__name__}: {error}."
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (DiskError if full else CheckpointError)(f"{text} Earlier checkpoints are untouched.") from error

    return engine.ranks.together(write)
