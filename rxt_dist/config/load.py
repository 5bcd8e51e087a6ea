"""From YAML files and `a.b=c` overrides to validated configuration objects, with errors that name file and line.

A run file joins others: the value of `model`, `data` or `cluster` may be a string, the path of a YAML file relative to
the file it stands in. Overrides are applied after joining, in order; their values are YAML too. An override that gives
one of the three a path (`model=configs/model/demo.yaml`) joins that file, relative to the current directory.

All other paths (`data.path`, `output`) are relative to the current directory wherever they are written, so that one
command started in one place means one thing.
"""

from __future__ import annotations

import hashlib
import json
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from rxt_dist.config.base import Config
from rxt_dist.config.model import ModelConfig
from rxt_dist.config.run import DataConfig, RunConfig, run_class
from rxt_dist.config.stages import DEFAULT_STAGE, STAGES
from rxt_dist.config.tree import KeyPath, Tree, dotted
from rxt_dist.errors import ConfigError, nearest

JOINED = ("model", "data", "cluster")

# What may change when a run is resumed: where it runs and what it writes, and what changes speed and memory only.
# The content of the data is compared by its fingerprint, so that its folder may move.
RESUMABLE = (
    "output",
    "cluster",
    "parallel",
    "log",
    "checkpoint",
    "eval",
    "health",
    # The data is compared by content: by its digest, and the consumed part of its order by the plan's hash; the origin
    # of the weights is named in every checkpoint.
    "data.path",
    "start.run",
    "start.export",
    "start.fresh",
    "start.unfinished",
    "data.tokenizer",
    "data.mixture",
    "data.max_epochs",
    "data.build",
    "train.micro_batch_rows",
    "train.recompute",
    "train.compile",
    "train.logit_chunk_tokens",
    # A person may have to turn these in the middle of a run; the change is logged as an event.
    "optimizer.lr",
    "optimizer.clip",
    "train.max_skipped_steps",
    "train.time_limit",
)

# How many of a configuration's mistakes are told at once.
_PROBLEMS_TOLD = 20

ConfigT = TypeVar("ConfigT", bound=Config)


def load_run(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, join the files it names, apply `overrides`, validate.

    Raises:
        ConfigError: for anything wrong in the files or overrides, with file and line and what is allowed.
    """
    tree = Tree.read(path)
    if isinstance(tree.values, dict) and "links" in tree.values:
        raise ConfigError(f"{path} is a chain of runs: use `rxt-dist pipeline {path}`, or name the file of one run.")
    join_files(tree, path.parent)
    for override in overrides:
        tree.override(override, joined=JOINED)
    return run_of(tree)


def join_files(tree: Tree, base: Path) -> None:
    """Replace the names of files, relative to `base`, by what they hold."""
    for key in JOINED:
        if isinstance(tree.values, dict) and isinstance(tree.values.get(key), str):
            tree.join(key, base)


def run_of(tree: Tree) -> RunConfig:
    """The run that a tree describes, its files joined.

    Raises:
        ConfigError: as `load_run`.
    """
    return validated(run_class(_stage_kind(tree)), tree)


def _stage_kind(tree: Tree) -> str:
    """The kind of stage, which decides how the rest is read."""
    stage = tree.values.get("stage") if isinstance(tree.values, dict) else None
    kind = stage.get("kind", DEFAULT_STAGE) if isinstance(stage, dict) else DEFAULT_STAGE
    if not isinstance(kind, str) or kind not in STAGES:
        known = ", ".join(STAGES)
        raise ConfigError(
            f"{tree.place(('stage', 'kind'))}: 'stage.kind' is {json.dumps(kind, default=str)}, but the stages are "
            f"{known}.{nearest(str(kind), STAGES)}"
        )
    return kind


def load_model(path: Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Read a model file alone; overrides count from the model (`vocab_size=4096`).

    Raises:
        ConfigError: as `load_run`.
    """
    tree = Tree.read(path)
    for override in overrides:
        tree.override(override, joined=())
    return validated(ModelConfig, tree)


def load_data(path: Path, overrides: Sequence[str] = ()) -> DataConfig:
    """Read a data file alone; overrides count from the data (`seq_len=1024`). A folder stands for a file that names it
    as `path`.

    Raises:
        ConfigError: as `load_run`.
    """
    tree = Tree(str(path), {"path": str(path)}) if path.is_dir() else Tree.read(path)
    for override in overrides:
        tree.override(override, joined=())
    return validated(DataConfig, tree)


def load_settings(kind: type[ConfigT], path: Path | None, options: Mapping[str, Any]) -> ConfigT:
    """Read settings of one class: of a file, where there is one, and of options of a command, which count before it.

    Args:
        options: by the names of the fields; an option is called as its field, with hyphens.

    Raises:
        ConfigError: as `load_run`.
    """
    tree = Tree.read(path) if path is not None else Tree("command line", {})
    if isinstance(tree.values, dict):
        for name, value in options.items():
            tree.values[name] = value
            tree.places[name,] = f"option --{name.replace('_', '-')}"
    return validated(kind, tree)


def is_model_file(path: Path) -> bool:
    """Whether a file describes a model alone, and not a run."""
    values = Tree.read(path).values
    return isinstance(values, dict) and "decoder" in values


class _Dumper(yaml.SafeDumper):
    """Writes out what stands in several places, instead of naming it by an alias: a person reads and edits it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def resolved_yaml(config: Config) -> str:
    """The whole configuration with all defaults, as YAML that `load_run` reads back to an equal one."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def training_hash(config: RunConfig) -> str:
    """Hex sha256 of what decides the sequence of losses: the configuration without `RESUMABLE`."""
    values = config.model_dump(mode="json")
    for name in RESUMABLE:
        *parents, last = name.split(".")
        parent: Any = values
        for key in parents:
            parent = parent[key] or {}
        parent.pop(last, None)
    start = values["start"]
    if start is not None:
        start["also"] = [origin["parts"] for origin in start["also"]]
        # A run from one other has the hash that it had before there could be several.
        start = {name: value for name, value in start.items() if value}
    values["start"] = start
    if not start:
        # A run from nothing has the hash that it had before runs could begin from another.
        del values["start"]
    return _hash(values)


def _hash(values: Any) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def validated(kind: type[ConfigT], tree: Tree) -> ConfigT:
    """Validate strictly: a number is no text, a truth value no number; lists become tuples and texts paths.

    Raises:
        ConfigError: as `load_run`.
    """
    try:
        return kind.model_validate_json(json.dumps(tree.values, default=str), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)
    problems = [_explain(kind, tree, dict(detail)) for detail in details[:_PROBLEMS_TOLD]]
    if len(details) > _PROBLEMS_TOLD:
        problems.append(f"and {len(details) - _PROBLEMS_TOLD:,} more mistakes.")
    raise ConfigError("\n".join(problems))


def _explain(kind: type[Config], tree: Tree, detail: dict[str, Any]) -> str:
    path: KeyPath = detail["loc"]
    name, place = dotted(path), tree.place(path)
    if detail["type"] == "extra_forbidden":
        return f"{place}: unknown key '{name}'.{_guess(kind, path)}"
    if detail["type"] == "missing":
        return f"{place}: '{name}' is missing and has no default: set it{_hint(kind, path)}."
    # "Input should be ...", "String should have at most ..."
    message = re.sub(r"^\w+ (?=should )", "", str(detail["msg"]))
    if detail["type"] == "value_error":
        inside = f"in '{name}', " if name else ""
        return f"{place}: {inside}{message.removeprefix('Value error, ')}."
    if isinstance(detail["input"], float) and abs(detail["input"]) >= 2**63:
        message = message.replace("a valid integer", "a whole number of at most 64 bits")
    value = json.dumps(detail["input"], default=str, ensure_ascii=False)
    value = value if len(value) <= 80 else value[:77] + "..."
    subject = f"'{name}'" if name else "the configuration"
    return f"{place}: {subject} cannot be {value}: it {_in_yaml_words(message)}{_hint(kind, path)}."


def _guess(kind: type[Config], path: KeyPath) -> str:
    """What the person may have meant by the unknown key at `path`: the same name elsewhere, or a like name here."""
    elsewhere = [name for name in _all_keys(kind) if name.split(".")[-1] == path[-1]]
    if elsewhere:
        return f" Did you mean {' or '.join(repr(name) for name in elsewhere)}?"
    here = list(_class_at(kind, path[:-1]).model_fields)
    # By the key alone: names that share a long path would all seem alike.
    meant = nearest(str(path[-1]), here)
    place = "".join(f"{part}." for part in path[:-1])
    return meant.replace("'", f"'{place}", 1) if meant else f" Known here: {', '.join(here)}."


def _all_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for key, description in kind.model_fields.items():
        yield prefix + key
        for inner in _classes_in(description.annotation):
            yield from _all_keys(inner, f"{prefix}{key}.")


def _in_yaml_words(message: str) -> str:
    return message.replace("valid array", "list").replace("an object", "a mapping of keys to values")


def _class_at(kind: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    """The configuration class whose fields stand at `path`."""
    for part in path:
        if part in kind.model_fields:
            kind = next(_classes_in(kind.model_fields[str(part)].annotation), kind)
    return kind


def _classes_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _classes_in(argument)


def _hint(kind: type[Config], path: KeyPath) -> str:
    """The field's own description, in brackets."""
    known = _class_at(kind, path[:-1]).model_fields
    described = known[str(path[-1])].description if path and path[-1] in known else None
    return f" ({described.rstrip('.')})" if described else ""
