"""Beginning a run with weights that another run, or an export, has.

What does not fit is refused before anything is built, by names and shapes alone: those of a run come from its resolved
configuration, those of an export from the headers of its files. Contents are read, and verified, when a run really
begins; one that resumes has everything in its own checkpoints and never looks here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.config.run import StartConfig
from rxt_dist.engine.interface import WEIGHT
from rxt_dist.errors import CheckpointError, ConfigError
from rxt_dist.files import sha256_file
from rxt_dist.stages.base import build_network

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 4
# Integers would be taken for weights as they are, without the scales that they were divided by.
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Origin:
    """Where weights came from: `path` as the run named it; run id, step and digest of the checkpoint's manifest, or
    (without the first two) a digest of an export's files. parts: what was taken."""

    path: str
    run_id: str | None
    step: int | None
    digest: str
    parts: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


# Name of a parameter, an offset in it once it is flattened, and a tensor [n] for the elements from there on.
Run = tuple[str, int, Tensor]


class _Weights(Protocol):
    """What weights can be taken from."""

    def shapes(self) -> Shapes:
        """Shape of every parameter that there is, by its name; reads no weights."""
        ...

    def choose(self, report: Callable[[str], None]) -> tuple[Checkpoint | None, str]:
        """Verify the contents. Returns the checkpoint that is meant, if it is one, and a digest."""
        ...

    def fill(self, checkpoint: Checkpoint | None, runs: Iterable[Run]) -> None:
        """Copy runs of parameters into tensors of their lengths."""
        ...


def check_start(start: StartConfig, model: nn.Module) -> None:
    """Refuse an origin that lacks one of the parts, or has it with other parameters or in other shapes.

    Args:
        model: the network that is to be filled; without weights (meta) will do.

    Raises:
        ConfigError, CheckpointError: naming everything that does not fit.
    """
    shapes = _weights(start).shapes()
    there = {name.split(".")[0] for name in shapes}
    missing = [part for part in start.parts if part not in there]
    if missing:
        raise ConfigError(
            f"start.parts names {', '.join(missing)}, but {_place(start)} holds only {', '.join(sorted(there))}: leave "
            f"them out, and they begin afresh, or begin from another run."
        )
    wanted = {name: tuple(parameter.shape) for name, parameter in _named(model, start.parts)}
    found = {name: shape for name, shape in shapes.items() if name.split(".")[0] in start.parts}
    lacking, surplus = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    differing = [
        f"{name} is {list(found[name])} there and {list(shape)} here"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what}: {'; '.join(names[:_SHOWN])}{f'; and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
        for what, names in (("missing there", lacking), ("missing here", surplus), ("of other shapes", differing))
        if names
    ]
    if problems:
        raise ConfigError(
            f"The parts {', '.join(start.parts)} of {_place(start)} are not those of this run's model. Parameters "
            f"{', '.join(problems)}. Use the model of that run, or leave the part out of start.parts."
        )


def choose_origin(start: StartConfig, report: Callable[[str], None]) -> Origin:
    """Verify where the weights come from; reads all of them, so that one rank does it for all.

    Args:
        report: told about checkpoints that were passed over.

    Raises:
        CheckpointError: there is no valid checkpoint.
    """
    checkpoint, digest = _weights(start).choose(report)
    run_id, step = (str(checkpoint.meta["run_id"]), checkpoint.step) if checkpoint else (None, None)
    return Origin(str(start.run or start.export), run_id, step, digest, start.parts)


def chosen_checkpoint(start: StartConfig, origin: Origin) -> Checkpoint | None:
    """The checkpoint that `choose_origin` chose, on whichever rank; None if weights come from an export.

    Raises:
        CheckpointError: it is there no more.
    """
    if start.run is None or origin.step is None:
        return None
    return CheckpointStore(start.run / "checkpoints", MIN_KEEP).read(origin.step)


def fill_from(start: StartConfig, checkpoint: Checkpoint | None, runs: Iterable[Run]) -> None:
    """Fill runs of parameters of the named parts from what `choose_origin` chose.

    Raises:
        CheckpointError: something of them is missing, or was removed since: a run that is being trained prunes its
            checkpoints.
    """
    try:
        with torch.no_grad():
            _weights(start).fill(checkpoint, runs)
    except FileNotFoundError as error:
        place = checkpoint.path if checkpoint else _place(start)
        raise CheckpointError(
            f"{place} was removed while its weights were taken ({error}); a run that is being trained removes its old "
            f"checkpoints. Start again: the newest one is taken then. To begin from this one, copy it, or export it "
            f"with `rxt-dist export`."
        ) from error


def shapes_of_run(directory: Path) -> Shapes:
    """Shape of every parameter of a run's network, by its name, from its resolved configuration.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = directory / "config.resolved.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{directory} holds no run: there is no {path.name} in it. Name the folder of a run, for example runs/NAME."
        )
    with torch.device("meta"):
        model = build_network(load_run(path))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _named(model: nn.Module, parts: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if name.split(".")[0] in set(parts)]


def _place(start: StartConfig) -> str:
    return f"start.run {start.run}" if start.run else f"start.export {start.export}"


def _weights(start: StartConfig) -> _Weights:
    if start.run is not None:
        return _RunWeights(start.run)
    assert start.export is not None
    return _ExportWeights(start.export, start.parts)


class _RunWeights:
    """The newest valid checkpoint of a run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._store = CheckpointStore(directory / "checkpoints", MIN_KEEP)

    def shapes(self) -> Shapes:
        shapes = shapes_of_run(self._directory)
        if all(self._store.verify(step, full=False) for step in self._store.steps()):
            raise CheckpointError(
                f"start.run {self._directory} has no committed checkpoint that is whole: train that run first, or see "
                f"`rxt-dist checkpoint list {self._directory}`."
            )
        return shapes

    def choose(self, report: Callable[[str], None]) -> tuple[Checkpoint | None, str]:
        checkpoint = self._store.latest_valid(report)
        if checkpoint is None:
            raise CheckpointError(f"start.run {self._directory} has no valid checkpoint to begin from.")
        return checkpoint, checkpoint.digest

    def fill(self, checkpoint: Checkpoint | None, runs: Iterable[Run]) -> None:
        assert checkpoint is not None
        pieces = SavedPieces(checkpoint)
        for name, first, target in runs:
            pieces.fill(WEIGHT, name, first, target)


class _ExportWeights:
    """A folder of .safetensors files whose tensors are named as the network's parameters."""

    def __init__(self, directory: Path, parts: Collection[str]) -> None:
        self._directory, self._parts = directory, parts
        self._paths = sorted(directory.glob("*.safetensors"))
        if not self._paths:
            raise ConfigError(f"start.export is {directory}, which holds no .safetensors file.")
        self._stack = ExitStack()
        self._tensors: dict[str, Any] = {}
        for path in self._paths:
            try:
                file = self._stack.enter_context(safe_open(path, "pt"))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} cannot be read as safetensors: {error}.") from error
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name in self._tensors:
                    raise CheckpointError(f"{directory} holds '{name}' twice; the second time in {path.name}.")
                self._tensors[name] = file

    def shapes(self) -> Shapes:
        slices = {name: file.get_slice(name) for name, file in self._tensors.items()}
        for name, found in slices.items():
            if name.split(".")[0] in self._parts and found.get_dtype() not in _FLOATS:
                raise ConfigError(
                    f"'{name}' in start.export {self._directory} has the type {found.get_dtype()}, but weights are "
                    f"{', '.join(_FLOATS)}: export them without quantisation."
                )
        return {name: tuple(found.get_shape()) for name, found in slices.items()}

    def choose(self, report: Callable[[str], None]) -> tuple[Checkpoint | None, str]:
        described = "".join(f"{path.name}:{sha256_file(path)};" for path in self._paths)
        return None, hashlib.sha256(described.encode()).hexdigest()

    def fill(self, checkpoint: Checkpoint | None, runs: Iterable[Run]) -> None:
        for name, first, target in runs:
            saved = self._tensors[name].get_slice(name)
            shape = saved.get_shape()
            # Whole rows of the first axis, no more of them than the run touches.
            width = math.prod(shape[1:])
            row = first // width
            rows = saved[row : -(-(first + target.numel()) // width)]
            target.copy_(rows.flatten()[first - row * width :][: target.numel()])
