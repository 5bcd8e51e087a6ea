"""The weights of a checkpoint as a folder that others load: safetensors, configuration, tokenizer, model card.

Two formats: ours (`rxt`), whole parameters under their own names, and the reference implementation's (`rxlm`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from rxt_dist.checkpoint.model_card import model_card
from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.reference_config import Folder, reference_folders
from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.start import shapes_of_run
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore, FileRecord, content_problems
from rxt_dist.checkpoint.tensor_file import Described, write_blocks
from rxt_dist.config.load import load_run, resolved_yaml
from rxt_dist.config.model import ModelConfig
from rxt_dist.config.run import RunConfig
from rxt_dist.data.dialogues import load_any_manifest
from rxt_dist.data.manifest import DATASET_FILE, TOKENIZER_FILE
from rxt_dist.data.text import Text
from rxt_dist.engine.interface import WEIGHT
from rxt_dist.errors import CheckpointError, ConfigError, DataError
from rxt_dist.files import (
    access_errors,
    blake3_file,
    fsync_dir,
    require_folder,
    require_free_space,
    temporary_path,
    write_atomic,
    write_json_atomic,
)
from rxt_dist.model.reference_names import outward

EXPORT_FILE, MODEL_FILE, CARD_FILE = "export.json", "model.yaml", "README.md"
Format = Literal["rxt", "rxlm"]
# A file of an export is closed before it passes this, unless one parameter alone does.
_FILE_BYTES = 4 << 30
# Elements that are read and written at once (16 MB).
_BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Wanted:
    """What is exported.

    step: of the checkpoint; None: the newest valid one. dtype: float32, as weights are learnt, or bfloat16.
    tokenizer: the model's; None: that of the run's dataset.
    """

    run: Path
    out: Path
    format: Format = "rxt"
    step: int | None = None
    dtype: torch.dtype = torch.float32
    tokenizer: Path | None = None


def export_run(wanted: Wanted, report: Callable[[str], None]) -> list[FileRecord]:
    """Write the weights of a run's checkpoint, and what belongs to them, into a new folder, a block at a time.

    Args:
        report: told what is passed over, which checkpoint is taken, and what the format cannot say.

    Raises:
        ConfigError: `out` is there and not empty, or cannot be made; `run` is no run.
        DataError: the tokenizer is missing, or not that of the run's data.
        CheckpointError: there is no such checkpoint, or it is damaged.
        DiskError: the disk is full. `out` is whole or not there, whatever happens.
    """
    require_new(wanted.out)
    checkpoint = _chosen(wanted.run, wanted.step, report)
    shapes = shapes_of_run(wanted.run)
    config = load_run(wanted.run / "config.resolved.yaml")
    tokenizer = _tokenizer(wanted, config)
    dtype_name = str(wanted.dtype).removeprefix("torch.")
    size = sum(Described(wanted.dtype, shape).bytes for shape in shapes.values())
    require_free_space(wanted.out, size, "The export")
    report(f"exporting {checkpoint.path}: {len(shapes)} parameters as {dtype_name}")
    with making_folder(wanted.out) as making:
        if wanted.format == "rxt":
            described = {name: Described(wanted.dtype, shape) for name, shape in shapes.items()}
            records = write_ours(making, described, lambda portion: _blocks(SavedPieces(checkpoint), portion))
            usage = _OUR_USAGE.format(name=wanted.out.name)
        else:
            folders = reference_folders(config.model, shapes)
            records = _write_reference(making, folders, _Whole(SavedPieces(checkpoint), shapes), wanted.dtype)
            usage = _reference_usage(folders)
            for remark in reference_remarks(config.model):
                report(remark)
        parts = sorted({name.split(".")[0] for name in shapes})
        write_atomic(making / CARD_FILE, model_card(wanted.run, config, checkpoint, parts, usage))
        told = {
            "format": wanted.format,
            "run": str(wanted.run),
            "run_id": checkpoint.meta.get("run_id"),
            "step": checkpoint.step,
            "tokens": checkpoint.meta.get("tokens"),
            "digest": checkpoint.digest,
            "dtype": dtype_name,
        }
        seal(making, config.model, tokenizer.path.read_text(encoding="utf-8"), records, told)
    return records


# ---------------------------------------------------------------------------------------------------------------------
# What every export has
# ---------------------------------------------------------------------------------------------------------------------


def require_new(out: Path) -> None:
    """Raise ConfigError where something is already, or nothing can be made."""
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} is there already, and nothing is written over it. Name a folder that is not.")
    require_folder(out)


@contextmanager
def making_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when all has gone well, and else is removed."""
    making = temporary_path(out)
    with access_errors(out, "Nothing was exported."):
        making.parent.mkdir(parents=True, exist_ok=True)
        making.mkdir()
        try:
            yield making
            os.rename(making, out)
        except BaseException:
            shutil.rmtree(making, ignore_errors=True)
            raise
        fsync_dir(out.parent)


def seal(
    making: Path, model: ModelConfig, tokenizer: str | None, records: list[FileRecord], told: Mapping[str, Any]
) -> None:
    """Add model and tokenizer (the content of its file) to an export, and what vouches for all of it."""
    write_atomic(making / MODEL_FILE, resolved_yaml(model))
    names = [MODEL_FILE]
    if tokenizer is not None:
        write_atomic(making / TOKENIZER_FILE, tokenizer)
        names.append(TOKENIZER_FILE)
    files = [*records, *(record_of(making, name) for name in names)]
    write_json_atomic(making / EXPORT_FILE, {**told, "files": [record.to_json() for record in files]})


def record_of(folder: Path, name: str) -> FileRecord:
    """Size and hash of a file of an export."""
    return FileRecord(name, (folder / name).stat().st_size, blake3_file(folder / name))


def verify_export(folder: Path) -> dict[str, Any]:
    """What an export says of itself, if every file that it names is as it was written; else an empty dictionary, if
    it is of another program.

    Raises:
        CheckpointError: a file is missing, cut short or altered.
    """
    path = folder / EXPORT_FILE
    if not path.is_file():
        return {}
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        records = [FileRecord(**record) for record in told["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}): it is damaged. Export again.") from error
    if problems := content_problems(folder, records):
        raise CheckpointError(f"The export {folder} is damaged: {'; '.join(problems)}. Export or copy it again.")
    return told


def write_ours(
    folder: Path, described: Mapping[str, Described], blocks: Callable[[Mapping[str, Described]], Iterator[Tensor]]
) -> list[FileRecord]:
    """Write parameters under our names; `blocks` gives the elements of a portion of them, one after another."""
    portions = list(_portions(described))
    records = []
    for number, portion in enumerate(portions, 1):
        path = folder / f"model-{number:05d}-of-{len(portions):05d}.safetensors"
        digest = write_blocks(path, portion, blocks(portion))
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


# ---------------------------------------------------------------------------------------------------------------------
# What a run has
# ---------------------------------------------------------------------------------------------------------------------


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


def _tokenizer(wanted: Wanted, config: RunConfig) -> Text:
    path = wanted.tokenizer or config.data.path / TOKENIZER_FILE
    if not path.is_file():
        raise DataError(
            f"The tokenizer {path} does not exist, and weights are of no use without it. Name it with --tokenizer."
        )
    text = Text(path, config.model.vocab_size)
    if (config.data.path / DATASET_FILE).is_file():
        made_with = load_any_manifest(config.data.path).tokenizer_sha256
        if made_with != text.fingerprint:
            repair = f"Try `rxt-dist data verify {config.data.path} --repair`."
            mend = "Leave out --tokenizer." if wanted.tokenizer else repair
            raise DataError(
                f"{path} is not the tokenizer that the run's data was made with ({config.data.path / TOKENIZER_FILE}): "
                f"every id would mean something else. {mend}"
            )
    return text


def _blocks(pieces: SavedPieces, portion: Mapping[str, Described]) -> Iterator[Tensor]:
    for name, tensor in portion.items():
        size = torch.Size(tensor.shape).numel()
        for first in range(0, size, _BLOCK_ELEMENTS):
            block = torch.empty(min(_BLOCK_ELEMENTS, size - first))
            pieces.fill(WEIGHT, name, first, block)
            yield block.to(tensor.dtype)


class _Whole:
    """Whole parameters, of which the last is kept: the experts of a stack are asked for one after another."""

    def __init__(self, pieces: SavedPieces, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = shapes
        self._pieces = pieces
        self._last: tuple[str, Tensor] | None = None

    def __call__(self, name: str) -> Tensor:
        """float32."""
        if self._last is None or self._last[0] != name:
            tensor = torch.empty(self.shapes[name])
            self._pieces.fill(WEIGHT, name, 0, tensor.view(-1))
            self._last = name, tensor
        return self._last[1]


# ---------------------------------------------------------------------------------------------------------------------
# The reference's format
# ---------------------------------------------------------------------------------------------------------------------


def _write_reference(making: Path, folders: list[Folder], whole: _Whole, dtype: torch.dtype) -> list[FileRecord]:
    records = []
    for folder in folders:
        place = making / folder.path
        place.mkdir(exist_ok=True)
        write_json_atomic(place / "config.json", folder.config)
        described = {}
        for name, entry in folder.tensors.items():
            shape = outward(entry, torch.empty(whole.shapes[entry.ours], device="meta")).shape
            described[name] = Described(dtype, tuple(shape))

        def blocks(folder: Folder = folder) -> Iterator[Tensor]:
            for entry in folder.tensors.values():
                yield outward(entry, whole(entry.ours)).to(dtype).contiguous().view(-1)

        path = place / "model.safetensors"
        digest = write_blocks(path, described, blocks())
        _require_names(path, described)
        records.append(FileRecord(path.relative_to(making).as_posix(), path.stat().st_size, digest))
        records.append(record_of(making, (place / "config.json").relative_to(making).as_posix()))
    return records


def _require_names(path: Path, described: Mapping[str, Described]) -> None:
    """What the reference does not compare when it loads: every tensor is there, in its shape."""
    with safe_open(path, "pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert found == {name: tensor.shape for name, tensor in described.items()}, f"{path} is not what was meant"


def reference_remarks(model: ModelConfig) -> list[str]:
    """What the reference computes in another way than this model."""
    remarks = []
    if model.norm_eps is not None:
        remarks.append(
            f"the reference has no norm_eps: it takes the machine epsilon of its type where this model has "
            f"{model.norm_eps:g}, which changes logits in the sixth digit"
        )
    if model.rope_angles == "bfloat16":
        remarks.append("this model has rope_angles bfloat16: load it in the reference in bfloat16")
    return remarks


_OUR_USAGE = """    from rxt_dist.inference import Assistant
    assistant = Assistant.load("{name}")
    session = assistant.session(seed=0)
    for event in assistant.interact(session, "Who are you?"):
        print(getattr(event, "text", ""), end="", flush=True)

On the command line: `rxt-dist chat {name}`."""


def _reference_usage(folders: list[Folder]) -> str:
    lines = [f'    {folder.loads}.from_pretrained("{folder.path or "."}")' for folder in folders]
    return (
        "In the format of the public package `rxlm`, which has a licence of its own:\n\n"
        + "\n".join(lines)
        + "\n\nAfter loading a whole system call `share_components()`. The tokenizer is handed over by the caller."
    )
