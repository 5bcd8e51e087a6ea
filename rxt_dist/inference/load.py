"""A network and its tokenizer, from a run's newest valid checkpoint or from an export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rxt_dist.checkpoint.export import EXPORT_FILE, MODEL_FILE, verify_export
from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.start import shapes_of_run
from rxt_dist.checkpoint.store import CheckpointStore
from rxt_dist.config.load import load_model, load_run
from rxt_dist.config.model import ModelConfig, PartName
from rxt_dist.data.manifest import TOKENIZER_FILE
from rxt_dist.data.text import Text
from rxt_dist.engine.interface import WEIGHT
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.model.reactive import ReactiveTransformer, described_parts

_RUN_FILE = "config.resolved.yaml"
_SHOWN = 3


def load_network(
    place: Path, tokenizer: Path | None = None, report: Callable[[str], None] = lambda line: None
) -> tuple[ReactiveTransformer, Text]:
    """The network on the host, in float32, and its tokenizer.

    Args:
        place: directory of a run, or of an export of format rxt.
        tokenizer: in the place of the one that belongs to it.
        report: told which checkpoints are passed over.

    Raises:
        ConfigError: `place` is neither.
        CheckpointError: nothing valid is there, or what is there is damaged, half written, or not what its
            configuration describes.
        DataError: the tokenizer is missing, or of another vocabulary.
    """
    if (place / _RUN_FILE).is_file():
        config = load_run(place / _RUN_FILE)
        network = _of_run(place, config.model, report)
        tokenizer = tokenizer or config.data.path / TOKENIZER_FILE
    elif verify_export(place).get("format") == "rxt":
        network = _of_export(place, load_model(place / MODEL_FILE))
        tokenizer = tokenizer or place / TOKENIZER_FILE
    elif (place / "config.json").is_file() or any(place.glob("*/config.json")):
        raise ConfigError(
            f"{place} is in the format of published weights. Make an export of it first: rxt-dist import {place} --out "
            "DIR"
        )
    else:
        raise ConfigError(
            f"{place} is neither the directory of a run (there is no {_RUN_FILE}) nor an export (there is no "
            f"{EXPORT_FILE}, which is written last). Name a folder such as runs/NAME, or what `rxt-dist export` made."
        )
    return network, Text(tokenizer, network.config.vocab_size)


def _of_run(run: Path, model: ModelConfig, report: Callable[[str], None]) -> ReactiveTransformer:
    shapes = shapes_of_run(run)
    checkpoint = CheckpointStore(run / "checkpoints", MIN_KEEP).latest_valid(report)
    if checkpoint is None:
        raise CheckpointError(f"{run} has no valid checkpoint. See `rxt-dist checkpoint verify {run}`.")
    network = _empty(model, {name.split(".")[0] for name in shapes})
    pieces = SavedPieces(checkpoint)
    for name, parameter in network.named_parameters():
        pieces.fill(WEIGHT, name, 0, parameter.data.view(-1))
    return network


def _of_export(folder: Path, model: ModelConfig) -> ReactiveTransformer:
    """Every parameter must be there once, in its shape, and nothing else."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors ({error}): export again.") from error
    parts = {name.split(".")[0] for name in tensors}
    network = _empty(model, parts & set(described_parts(model)))
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        told = [f"{name}: {found.get(name, 'missing')} instead of {wanted.get(name, 'none')}" for name in wrong]
        raise CheckpointError(
            f"The weights in {folder} are not of the model in its {MODEL_FILE}: {'; '.join(told[:_SHOWN])}. Export it "
            "again."
        )
    network.load_state_dict(tensors)
    return network


def _empty(model: ModelConfig, parts: set[str]) -> ReactiveTransformer:
    """A network on the host whose weights are not set."""
    built: list[PartName] = [part for part in described_parts(model) if part in parts]
    with torch.device("meta"):
        network = ReactiveTransformer(model, built)
    return network.to_empty(device="cpu")
