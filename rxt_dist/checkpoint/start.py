"""Beginning a run with weights that another run, or an export, has.

What does not fit is refused before anything is built, by names and shapes alone: those of a run come from its resolved
configuration, those of an export from the headers of its files. Contents are read, and verified, when a run really
begins; one that resumes has everything in its own checkpoints and never looks here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from rxt_dist.checkpoint.pieces import SavedPieces
from rxt_dist.checkpoint.retention import MIN_KEEP
from rxt_dist.checkpoint.store import Checkpoint, CheckpointStore
from rxt_dist.config.load import load_run
from rxt_dist.config.run import OriginConfig, RunConfig, StartConfig
from rxt_dist.data.dialogues import load_any_manifest
from rxt_dist.data.manifest import TOKENIZER_FILE, tokenizer_fingerprint
from rxt_dist.engine.interface import WEIGHT
from rxt_dist.errors import CheckpointError, ConfigError, DataError, UserError
from rxt_dist.files import sha256_file
from rxt_dist.finished import is_finished
from rxt_dist.stages.base import build_network

Shapes = Mapping[str, tuple[int, ...]]
_SHOWN = 4
_CONFIG = "config.resolved.yaml"
# Elements that are looked at together.
_PORTION = 1 << 24
# Integers would be taken for weights as they are, without the scales that they were divided by.
_FLOATS = ("F64", "F32", "BF16", "F16")


@dataclass(frozen=True)
class Origin:
    """Where weights came from: `path` as the run named it; run id, step and digest of the checkpoint's manifest, or
    (without the first two) a digest of an export's files. parts: what was taken. also: further places."""

    path: str
    run_id: str | None
    step: int | None
    digest: str
    parts: tuple[str, ...]
    also: tuple[Origin, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; without `also` where there is nothing in it."""
        return {name: value for name, value in asdict(self).items() if name != "also" or value}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Origin:
        """What `to_dict` gave."""
        also = tuple(cls.from_dict(other) for other in values.get("also", ()))
        return cls(**{**values, "parts": tuple(values["parts"]), "also": also})

    @property
    def all(self) -> tuple[Origin, ...]:
        """This place and the further ones."""
        return (self, *self.also)

    def __str__(self) -> str:
        at = f"step {self.step} of {self.path}" if self.step is not None else self.path
        return f"{', '.join(self.parts)} from {at}"


# What was chosen of each place that weights come from: a checkpoint, or None of an export.
Chosen = tuple[Checkpoint | None, ...]
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
    for origin in start.origins:
        check_origin(origin, model, start.unfinished)


def check_origin(origin: OriginConfig, model: nn.Module, unfinished: bool) -> None:
    """`check_start` of one place; unfinished: whether a run may be taken that is not finished."""
    check_shapes(origin, _weights(origin).shapes(), model)
    if origin.run is not None and not unfinished:
        _require_finished(origin.run)


def check_shapes(origin: OriginConfig, shapes: Shapes, model: nn.Module) -> None:
    """Refuse a place that holds parameters of these shapes, where its parts are not those of the model.

    Raises:
        ConfigError: naming everything that does not fit.
    """
    there = {name.split(".")[0] for name in shapes}
    missing = [part for part in origin.parts if part not in there]
    if missing:
        raise ConfigError(
            f"start.parts names {', '.join(missing)}, but {origin.place} holds only {', '.join(sorted(there))}: leave "
            f"them out, and they begin afresh, or begin from another run."
        )
    wanted = {name: tuple(parameter.shape) for name, parameter in _named(model, origin.parts)}
    found = {name: shape for name, shape in shapes.items() if name.split(".")[0] in origin.parts}
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
            f"The parts {', '.join(origin.parts)} of {origin.place} are not those of this run's model. Parameters "
            f"{', '.join(problems)}. Use the model of that run, or leave the part out of start.parts."
        )


def _require_finished(run: Path) -> None:
    """Refuse a run that still trains or was stopped: what it would become is not what is in it."""
    if not is_finished(run):
        raise ConfigError(
            f"start.run {run} is not finished, so its newest checkpoint is not what it is to become: train it to its "
            f"end (one that an older version trained: run its command once more), or say that it is meant as it is: "
            f"start.unfinished=true."
        )


def check_tokenizer(origin: OriginConfig, fingerprint: str) -> None:
    """Refuse weights that were trained with another tokenizer, as far as their place says with which.

    Args:
        fingerprint: of the tokenizer that the run's data was made with.

    Raises:
        DataError: the tokenizers differ.
    """
    theirs = _run_tokenizer(origin.run) if origin.run is not None else _export_tokenizer(origin.export)
    if theirs is not None and theirs != fingerprint:
        raise DataError(
            f"The weights of {origin.place} were trained with tokenizer {theirs[:16]}..., but the data of this run "
            f"was made with {fingerprint[:16]}...: every id would mean something else. Make the data with the "
            f"tokenizer of those weights (`rxt-dist data build --tokenizer`, `data interactions --tokenizer`)."
        )


def _run_tokenizer(run: Path) -> str | None:
    """What its newest checkpoint says; one of an earlier version says nothing, but its data may still be there."""
    store = CheckpointStore(run / "checkpoints", MIN_KEEP)
    with suppress(UserError, OSError):
        said = store.read(max(store.steps())).meta.get("tokenizer")
        return str(said) if said else load_any_manifest(load_run(run / _CONFIG).data.path).tokenizer_sha256
    return None


def _export_tokenizer(export: Path | None) -> str | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        return tokenizer_fingerprint(((export or Path()) / TOKENIZER_FILE).read_text(encoding="utf-8"))
    return None


def choose_origin(start: StartConfig, report: Callable[[str], None]) -> Origin:
    """Verify where the weights come from; reads all of them, so that one rank does it for all.

    Args:
        report: told about checkpoints that were passed over.

    Raises:
        CheckpointError: there is no valid checkpoint, or a weight in it is not finite.
    """
    found = []
    for origin in start.origins:
        weights = _weights(origin)
        checkpoint, digest = weights.choose(report)
        _require_finite(origin, weights, checkpoint)
        run_id, step = (str(checkpoint.meta["run_id"]), checkpoint.step) if checkpoint else (None, None)
        found.append(Origin(str(origin.run or origin.export), run_id, step, digest, origin.parts))
    return replace(found[0], also=tuple(found[1:]))


def _require_finite(origin: OriginConfig, weights: _Weights, checkpoint: Checkpoint | None) -> None:
    """Refuse NaN and infinity: every loss would be NaN, long after anybody remembers where it came from."""
    for name, shape in sorted(weights.shapes().items()):
        if name.split(".")[0] not in origin.parts:
            continue
        size = math.prod(shape)
        for first in range(0, size, _PORTION):
            values = torch.empty(min(_PORTION, size - first))
            weights.fill(checkpoint, [(name, first, values)])
            if not bool(values.isfinite().all()):
                at = first + int((~values.isfinite()).nonzero()[0])
                where = f", step {checkpoint.step}" if checkpoint else ""
                raise CheckpointError(
                    f"'{name}' of {origin.place}{where} holds {float(values[at - first])} (element {at:,} of "
                    f"{size:,}), so nothing can be trained from it: begin from an earlier checkpoint (`rxt-dist "
                    f"export`), or leave the part out of start.parts."
                )


def chosen_checkpoints(start: StartConfig, origin: Origin) -> Chosen:
    """The checkpoints that `choose_origin` chose, on whichever rank.

    Raises:
        CheckpointError: one is there no more.
    """
    places = zip(start.origins, origin.all, strict=True)
    return tuple(
        CheckpointStore(place.run / "checkpoints", MIN_KEEP).read(one.step)
        if place.run is not None and one.step is not None
        else None
        for place, one in places
    )


def fill_from(start: StartConfig, chosen: Chosen, runs: Iterable[Run]) -> None:
    """Fill runs of parameters of the named parts from what `choose_origin` chose.

    Raises:
        CheckpointError: something of them is missing, or was removed since: a run that is being trained prunes its
            checkpoints.
    """
    wanted = list(runs)
    for origin, checkpoint in zip(start.origins, chosen, strict=True):
        own = [run for run in wanted if run[0].split(".")[0] in origin.parts]
        try:
            with torch.no_grad():
                _weights(origin).fill(checkpoint, own)
        except FileNotFoundError as error:
            place = checkpoint.path if checkpoint else origin.place
            raise CheckpointError(
                f"{place} was removed while its weights were taken ({error}); a run that is being trained removes its "
                f"old checkpoints. Start again: the newest one is taken then. To begin from this one, copy it, or "
                f"export it with `rxt-dist export`."
            ) from error


def shapes_of_run(directory: Path) -> Shapes:
    """Shape of every parameter of a run's network, by its name, from its resolved configuration.

    Raises:
        ConfigError: the folder holds no run.
    """
    path = directory / _CONFIG
    if not path.is_file():
        raise ConfigError(
            f"{directory} holds no run: there is no {path.name} in it. Name the folder of a run, for example runs/NAME."
        )
    return shapes_of(load_run(path))


def shapes_of(run: RunConfig) -> Shapes:
    """Shape of every parameter of the network that a run trains, by its name."""
    with torch.device("meta"):
        model = build_network(run)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _named(model: nn.Module, parts: Iterable[str]) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if name.split(".")[0] in set(parts)]


def _weights(origin: OriginConfig) -> _Weights:
    if origin.run is not None:
        return _RunWeights(origin.run)
    assert origin.export is not None
    return _ExportWeights(origin.export, origin.parts)


class _RunWeights:
    """The newest valid checkpoint of a run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._store = CheckpointStore(directory / "checkpoints", MIN_KEEP)
        self._pieces: SavedPieces | None = None

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
        self._pieces = self._pieces or SavedPieces(checkpoint)
        for name, first, target in runs:
            self._pieces.fill(WEIGHT, name, first, target)


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
