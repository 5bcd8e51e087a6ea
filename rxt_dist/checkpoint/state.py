"""The training state of an engine as files, independent of ranks, ZeRO stage and expert parallelism.

Every rank writes the pieces that it holds, named `kind|parameter|offset`: a float32 run of the flattened parameter (or
of one of its moments) and where it begins. A load asks, for each piece that the loading rank holds, which saved pieces
overlap it. So no rank ever holds more than its own share, nothing is converted when the number of ranks changes, and a
one-process run reads what 64 GPUs wrote.

A checksum of all weights and moments and their places is kept in the manifest. A load computes it of what it has
filled, where it lies: it notices damage as hashes of the files do, and a piece that went to the wrong place, which they
cannot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor

from rxt_dist.checkpoint.checksum import checksum, wrapped
from rxt_dist.checkpoint.daemons import map_on_daemons, processors
from rxt_dist.checkpoint.frozen import FrozenWeights
from rxt_dist.checkpoint.pieces import ROUTING_FILE, SavedPieces, rank_prefix
from rxt_dist.checkpoint.runs import Run, runs_of
from rxt_dist.checkpoint.store import CHECKSUM, Checkpoint, CheckpointStore, FileRecord, content_problems
from rxt_dist.checkpoint.writing import Share, writing_errors
from rxt_dist.engine.interface import Engine
from rxt_dist.errors import CheckpointError

T = TypeVar("T")

# Threads that read at once, and what each reads before it sums it up: the system reads ahead meanwhile.
_THREADS = 4
_BLOCK_ELEMENTS = 1 << 21


def save_state(
    engine: Engine, frozen: FrozenWeights, store: CheckpointStore, step: int, meta: Mapping[str, Any]
) -> Path:
    """Write and commit a checkpoint of all parts, trained and frozen, while training waits; all ranks together.

    Nothing is copied: the files are written from the engine's own tensors.

    Args:
        meta: what else a load needs (JSON values); the checksum is added here.

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
        complete = {**meta, CHECKSUM: wrapped(sum(checksum for _, checksum in parts))}
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
    """Fill the engine, and what is not trained, with a checkpoint; all ranks together.

    Raises:
        CheckpointError: a parameter or a part of one is missing, the checkpoint has parameters that the model lacks,
            or the loaded state is not the saved one.
    """
    engine.finish_load(optimizer_steps, read_state(engine, frozen, checkpoint))


def read_state(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Fill all that a checkpoint holds, but let the engine derive nothing from it yet; all ranks together.

    Returns:
        The routing state.

    Raises:
        CheckpointError: see `load_state`.
    """
    routing: dict[str, Tensor] = {}

    def read() -> int:
        routing.update(_read_routing(checkpoint))
        return _fill(engine, frozen, checkpoint)

    found = wrapped(sum(engine.ranks.together(read)))
    saved = checkpoint.meta.get(CHECKSUM)
    if saved is not None and found != saved:
        raise CheckpointError(
            f"The state loaded from {checkpoint.path} has checksum {found}, but {saved} was "
            "saved: weights or moments went to the wrong place. This is a fault of the program; please report it."
        )
    return routing


def _read_routing(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The routing state, hashed: no checksum is kept of it."""
    if problems := content_problems(checkpoint.path, [file for file in checkpoint.files if file.name == ROUTING_FILE]):
        raise CheckpointError(f"{checkpoint.path}: {problems[0]}")
    with safe_open(checkpoint.path / ROUTING_FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _fill(engine: Engine, frozen: FrozenWeights, checkpoint: Checkpoint) -> int:
    """Fill this rank's fragments; refuses parameters that the model lacks in the files that it has opened.

    Returns:
        The checksum of what this rank saves, taken where it lies.
    """
    saved = SavedPieces(checkpoint, own=rank_prefix(engine.ranks.rank))

    def fill(run: Run) -> None:
        saved.fill(run.kind, run.name, run.start, run.values)

    def fill_and_sum(run: Run) -> int:
        fill(run)
        return checksum(run)

    own = own_share(engine, frozen).runs
    total = sum(_in_streams(fill_and_sum, own))
    # What is computed with of what is not trained lies elsewhere than what is saved of it.
    _in_streams(fill, [*_without(runs_of(engine.fragments(owned=False)), own), *runs_of(engine.frozen_fragments())])
    surplus = sorted(saved.names_so_far - frozen.model_names)
    if surplus:
        raise CheckpointError(
            f"Checkpoint {checkpoint.path} holds '{surplus[0]}' and {len(surplus) - 1} more parameters that model and "
            "stage of this run do not have. Resume it with the configuration that it was written with."
        )
    return total


def _in_streams(action: Callable[[Run], T], runs: Iterable[Run]) -> list[T]:
    """What `action` makes of blocks of all runs, by several threads, each of which reads what lies in one place: a
    system reads ahead for who goes on where he was."""
    blocks = [run.part(*block) for run in runs for block in _blocks(len(run.values))]
    threads = min(_THREADS, processors())
    length = -(-len(blocks) // threads) or 1
    streams = [blocks[first : first + length] for first in range(0, len(blocks), length)]

    def work(stream: Sequence[Run]) -> list[T]:
        with torch.no_grad():  # It belongs to a thread.
            return [action(block) for block in stream]

    return [result for results in map_on_daemons(work, streams, threads) for result in results]


def _blocks(length: int) -> Iterator[tuple[int, int]]:
    return ((first, min(first + _BLOCK_ELEMENTS, length)) for first in range(0, length, _BLOCK_ELEMENTS))


def _without(runs: Iterable[Run], others: Iterable[Run]) -> Iterator[Run]:
    """What of runs no other one of the same tensor holds."""
    held: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for other in others:
        held[other.kind, other.name].append((other.start, other.start + len(other.values)))
    for run in runs:
        at, length = 0, len(run.values)
        for first, end in sorted(held[run.kind, run.name]):
            begin = min(first - run.start, length)
            if at < begin:
                yield run.part(at, begin)
            at = max(at, end - run.start)
        if at < length:
            yield run.part(at, length)


def state_checksum(engine: Engine, frozen: FrozenWeights) -> int:
    """The checksum of the whole state (see `Share.checksum`); all ranks together."""
    return wrapped(sum(engine.ranks.gather(own_share(engine, frozen).checksum())))
