"""Published weights as an export of ours: verified, renamed and laid out anew, one parameter at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from rxt_dist.checkpoint.export import (
    MODEL_FILE,
    making_folder,
    require_new,
    seal,
    verify_export,
    write_ours,
)
from rxt_dist.checkpoint.published import PublishedPart, Stored, describe, read_published
from rxt_dist.checkpoint.tensor_file import Described
from rxt_dist.config.load import load_model
from rxt_dist.config.model import ModelConfig, PartName
from rxt_dist.data.manifest import TOKENIZER_FILE
from rxt_dist.data.text import Text
from rxt_dist.errors import CheckpointError
from rxt_dist.files import require_free_space
from rxt_dist.model.reactive import ReactiveTransformer
from rxt_dist.model.reference_names import Entry, Part, inward, sources

_BUILT: dict[Part, tuple[PartName, ...]] = {
    "decoder": ("embedding", "decoder", "lm_head"),
    "encoder": ("encoder",),
    "memory_attention": ("memory_attention",),
    "mlm_head": ("mlm_head",),
}
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float32, "F64": torch.float32}
_EMBEDDING = "embedding.weight"
_SHOWN = 4
Angles = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class _Made:
    """One of our parameters: what it is made of, and the part that it is from."""

    part: PublishedPart
    made_of: list[tuple[str, Entry]]

    @property
    def stored(self) -> list[Stored]:
        """The tensors, in order."""
        return [self.part.tensors[name] for name, _ in self.made_of]

    def laid(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Our parameter, of its tensors by name."""
        return inward(self.made_of, tensors)


def import_published(
    folders: list[Path], out: Path, tokenizer: Path | None, rope_angles: Angles | None, report: Callable[[str], None]
) -> ModelConfig:
    """Write an export of ours from folders of the reference's format.

    Args:
        folders: parts or a whole system.
        tokenizer: the model's; None: what lies in the folders, if anything does.
        rope_angles: None: bfloat16 if the decoder's weights are, since they were trained with such angles then.
        report: told what was found, and what these weights need.

    Raises:
        ConfigError: `out` is there already or cannot be made.
        CheckpointError: something is missing, unknown, of another shape, there twice and different, or damaged.
        DataError: the tokenizer cannot be read, or is of another vocabulary.
        DiskError: the disk is full. `out` is whole or not there, whatever happens.
    """
    require_new(out)
    for folder in folders:
        verify_export(folder)
    parts = read_published(folders)
    model = _model(parts, folders, out.name, rope_angles, report)
    made = _matched(model, parts, report)
    described = {name: _described(of) for name, of in made.items()}
    text = _tokenizer(folders, tokenizer, model, report)
    require_free_space(out, sum(tensor.bytes for tensor in described.values()), "The import")
    for part in parts.values():
        skipped = f", {part.buffers} buffers passed over" if part.buffers else ""
        report(f"{part.part.replace('_', ' ')} of {part.folder}: {len(part.tensors)} tensors{skipped}")
    if text is None:
        report(f"no tokenizer was found: to chat, copy the model's own into {out / TOKENIZER_FILE}, or import with it")
    with making_folder(out) as making:
        records = write_ours(making, described, lambda portion: _blocks(made, portion))
        told: dict[str, Any] = {"format": "rxt", "imported": [str(folder) for folder in folders]}
        seal(making, model, text, records, told)
    return model


def _model(
    parts: Mapping[Part, PublishedPart],
    folders: list[Path],
    name: str,
    rope_angles: Angles | None,
    report: Callable[[str], None],
) -> ModelConfig:
    """What our own export says of its model, or what can be read off published parts."""
    own = next((folder / MODEL_FILE for folder in folders if (folder / MODEL_FILE).is_file()), None)
    if own is not None:
        report(f"the model is described by {own}")
        model = load_model(own)
        return model if rope_angles is None else model.model_copy(update={"rope_angles": rope_angles})
    if rope_angles is None:
        head = parts["decoder"].tensors.get("model.head.weight") if "decoder" in parts else None
        rope_angles = "bfloat16" if head is not None and head.dtype == "BF16" else "float32"
    model = describe(parts, name, rope_angles)
    report("norm_eps: null, as published weights were trained with the machine epsilon of their type")
    report(f"rope_angles: {rope_angles} (--rope-angles says otherwise)")
    if any(part.config.get("use_flash_attention") for part in parts.values()):
        report("use_flash_attention: the reference then zeroes padded inputs, where this program masks them")
    return model


def _matched(
    model: ModelConfig, parts: Mapping[Part, PublishedPart], report: Callable[[str], None]
) -> dict[str, _Made]:
    """Everything that the parts have to hold, found in them and in its shape."""
    made: dict[str, _Made] = {}
    embeddings = []
    for part in parts.values():
        for ours, made_of in sources(model, part.part, part.tensors).items():
            if ours == _EMBEDDING:
                embeddings.append(_Made(part, made_of))
            made.setdefault(ours, _Made(part, made_of))
    if len(embeddings) > 1:
        _require_one_embedding(embeddings)
    elif embeddings:
        report(f"the embedding stands once, in the {embeddings[0].part.part}: it is that of both")
    built = [name for part in parts for name in _BUILT[part]]
    with torch.device("meta"):
        wanted = {
            name: tuple(parameter.shape) for name, parameter in ReactiveTransformer(model, built).named_parameters()
        }
    found = {name: _shape(of) for name, of in made.items()}
    missing = sorted(wanted.keys() - found.keys())
    surplus = sorted(found.keys() - wanted.keys())
    differing = [
        f"{name} is {list(found[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{what}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
        for what, names in (("missing", missing), ("that it has no place for", surplus), ("of other shapes", differing))
        if names
    ]
    if problems:
        raise CheckpointError(
            f"The folders do not hold the model that they describe. Parameters, by our names, {'; '.join(problems)}. "
            "Get the folders again, or name those that belong together."
        )
    return {name: made[name] for name in wanted}


def _shape(made: _Made) -> tuple[int, ...]:
    blanks = {tensor.name: torch.empty(tensor.shape, device="meta") for tensor in made.stored}
    own = {name: blanks[stored.name] for (name, _), stored in zip(made.made_of, made.stored, strict=True)}
    try:
        return tuple(made.laid(own).shape)
    except (RuntimeError, IndexError) as error:
        names = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in made.stored[:_SHOWN])
        raise CheckpointError(f"{made.part.folder} holds tensors of shapes that no model has: {names}.") from error


def _require_one_embedding(embeddings: list[_Made]) -> None:
    first, *others = [_tensor(of) for of in embeddings]
    for made, other in zip(embeddings[1:], others, strict=True):
        if first.shape != other.shape or not torch.equal(first.float(), other.float()):
            raise CheckpointError(
                f"The embeddings of {embeddings[0].part.folder} ({embeddings[0].part.part}) and {made.part.folder} "
                f"({made.part.part}) differ, but decoder and encoder share one: the parts are not of one model."
            )


def _described(made: _Made) -> Described:
    kinds = {tensor.dtype for tensor in made.stored}
    if unknown := kinds - _TYPES.keys():
        raise CheckpointError(
            f"'{made.stored[0].name}' of {made.part.folder} has the type {', '.join(unknown)}, but weights are "
            f"{', '.join(_TYPES)}: get them without quantisation."
        )
    dtype = torch.bfloat16 if kinds == {"BF16"} else torch.float32
    return Described(dtype, _shape(made))


def _tensor(made: _Made) -> Tensor:
    tensors = {}
    for (name, _), stored in zip(made.made_of, made.stored, strict=True):
        with safe_open(stored.path, "pt") as file:
            tensors[name] = file.get_tensor(stored.name)
    return made.laid(tensors)


def _blocks(made: Mapping[str, _Made], portion: Mapping[str, Described]) -> Iterator[Tensor]:
    for name, described in portion.items():
        yield _tensor(made[name]).to(described.dtype).contiguous().view(-1)


def _tokenizer(
    folders: list[Path], named: Path | None, model: ModelConfig, report: Callable[[str], None]
) -> str | None:
    """The content of the model's tokenizer.json, as it was used in training."""
    places = [named] if named else [folder / TOKENIZER_FILE for folder in folders]
    path = next((place for place in places if place.is_file()), named)
    if path is None:
        return None
    Text(path, model.vocab_size)
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    if not _drop_prefix_space(content.get("pre_tokenizer")):
        return text
    report("add_prefix_space: false, as the library that published models were trained with sets it so")
    return json.dumps(content, ensure_ascii=False)


def _drop_prefix_space(step: Any) -> bool:
    """Let no step of a pre-tokenizer put a space before a text; whether one did."""
    if not isinstance(step, dict):
        return False
    inner = [_drop_prefix_space(of) for of in step.get("pretokenizers") or []]
    did = bool(step.get("add_prefix_space"))
    if did:
        step["add_prefix_space"] = False
    return did or any(inner)
