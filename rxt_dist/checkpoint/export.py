"""The weights of a checkpoint as plain safetensors files: whole parameters under their own names, without moments."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.start import shapes_of_run
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore, FileRecord
from rxt_dist.checkpoint.tensor_file import Described, write_blocks
from rxt_dist.engine.interface import WEIGHT
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.files import (
    access_errors,
    fsync_dir,
    require_folder,
    require_free_space,
    temporary_path,
    write_json_atomic,
)

# A file of an export is closed before it passes this, unless one parameter alone does.
_FILE_BYTES = 4 << 30
# Elements that are read and written at once (16 MB).
_BLOCK_ELEMENTS = 1 << 22


def export_weights(
    run: Path, step: int | None, out: Path, dtype: torch.dtype, report: Callable[[str], None]
) -> list[FileRecord]:
    """Write the weights of a run's checkpoint into the new folder `out`, a block at a time.

    Args:
        step: of the checkpoint; None: the newest valid one.
        dtype: float32, as they are learnt, or bfloat16.
        report: told what is passed over, and which checkpoint is taken.

    Raises:
        ConfigError: `out` is there and not empty, or cannot be made; `run` is no run.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DiskError: the disk is full. `out` is whole or not there, whatever happens.
    """
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and nothing is written over it. Name a folder that is not.")
    require_folder(out)
    checkpoint = _chosen(run, step, report)
    shapes = shapes_of_run(run)
    described = {name: Described(dtype, shape) for name, shape in shapes.items()}
    require_free_space(out, sum(tensor.bytes for tensor in described.values()), "The export")
    report(f"exporting {checkpoint.path}: {len(shapes)} parameters as {str(dtype).removeprefix('torch.')}")
    making = temporary_path(out)
    with access_errors(out, "Nothing was exported."):
        making.parent.mkdir(parents=True, exist_ok=True)
        making.mkdir()
        try:
            records = _write(making, SavedPieces(checkpoint), described)
            told = {
                "run": str(run),
                "run_id": checkpoint.meta.get("run_id"),
                "step": checkpoint.step,
                "tokens": checkpoint.meta.get("tokens"),
                "digest": checkpoint.digest,
                "dtype": str(dtype).removeprefix("torch."),
                "files": [asdict(record) for record in records],
            }
            write_json_atomic(making / "export.json", told)
            os.rename(making, out)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        fsync_dir(out.parent)
    return records


def _chosen(run: Path, step: int | None, report: Callable[[str], None]) -> Checkpoint:
    """The checkpoint that is meant, its contents verified."""
    store = CheckpointStore(run / "checkpoints", MIN_KEEP)
    if step is None:
        found = store.latest_valid(report)
        if found is None:
            raise CheckpointError(f"{run} has no valid checkpoint. See `rxt-dist checkpoint verify {run}`.")
        return found
    if problems := store.verify(step):
        raise CheckpointError(f"Step {step} of {run} cannot be exported: {'; '.join(problems)}.")
    return store.read(step)


def _write(folder: Path, pieces: SavedPieces, described: Mapping[str, Described]) -> list[FileRecord]:
    portions = list(_portions(described))
    records = []
    for number, portion in enumerate(portions, 1):
        path = folder / f"model-{number:05d}-of-{len(portions):05d}.safetensors"
        digest = write_blocks(path, portion, _blocks(pieces, portion))
        records.append(FileRecord(path.name, path.stat().st_size, digest))
    return records


def _portions(described: Mapping[str, Described]) -> Iterator[dict[str, Described]]:
    """Parameters by the file that they go into."""
    portion: dict[str, Described] = {}
    for name, tensor in described.items():
        if portion and sum(other.bytes for other in portion.values()) + tensor.bytes > _FILE_BYTES:
            yield portion
            portion = {}
        portion[name] = tensor
    yield portion


def _blocks(pieces: SavedPieces, portion: Mapping[str, Described]) -> Iterator[Tensor]:
    for name, tensor in portion.items():
        size = torch.Size(tensor.shape).numel()
        for first in range(0, size, _BLOCK_ELEMENTS):
            block = torch.empty(min(_BLOCK_ELEMENTS, size - first))
            pieces.fill(WEIGHT, name, first, block)
            yield block.to(tensor.dtype)
