"""Chains of runs: one file that names the runs in order, what they have in common, and whose weights each takes.

    name: demo-chain
    common: {model: ../model/demo.yaml}
    links:
      texts: {data: [build, corpus, --out, data/texts], makes: data/texts}
      first: {run: ../run/demo.yaml}
      sft: {run: ../run/demo-sft.yaml, set: {optimizer: {lr: 1e-3}}}

A link is a run, or a job of `rxt-dist data`. A run's file is read, then `common`, then `set` is laid over it. Its
weights come from the links before it: each part that its stage builds from the last link that has it, unless `start`
says otherwise. Names of files in a chain are relative to it, all other paths to the current directory, as in a run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from rxt_dist.config.base import Config
from rxt_dist.config.load import JOINED, join_files, run_of, validated
from rxt_dist.config.phases import phase_paths
from rxt_dist.config.run import RunConfig
from rxt_dist.config.tree import Tree
from rxt_dist.errors import ConfigError, nearest

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_-]*$"


class LinkConfig(Config):
    """One link of a chain: a run, or a job that makes data."""

    run: str | dict[str, Any] | None = Field(
        None, description="Run file, relative to the chain's, or what would stand in one."
    )
    set: dict[str, Any] = Field({}, description="Settings of this run, laid over its file and over `common`.")
    start: dict[str, Any] | None = Field(
        None,
        description="As a run's `start`, with `link` in the place of `run`; null: all begins afresh; left out: each "
        "part comes from the last link before that has it.",
    )
    data: tuple[str, ...] | None = Field(None, description="Instead of a run: arguments of `rxt-dist data`.")
    makes: Path | None = Field(None, description="Folder that the data job makes.")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.run is None) == (self.data is None):
            raise ValueError("a link needs one of run and data")
        if (self.data is None) != (self.makes is None):
            raise ValueError("data and makes belong together: makes is the folder that the job makes")
        if self.data is not None and {"set", "start"} & self.model_fields_set:
            raise ValueError("set and start belong to a run, and this link makes data")
        return self


class ChainConfig(Config):
    """A chain, as read from configs/chain/*.yaml."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$",
        max_length=200,
        description="Name of the chain; its own folder is output / name.",
    )
    output: Path = Field(Path("runs"), description="Parent of the chain's folder and of all run directories.")
    common: dict[str, Any] = Field({}, description="Settings of all runs, laid over their files.")
    links: dict[str, LinkConfig] = Field(description="The links by name, in order.")

    @model_validator(mode="after")
    def _names(self) -> Self:
        if not any(link.run is not None for link in self.links.values()):
            raise ValueError("links names no run")
        return self


@dataclass(frozen=True)
class DataJob:
    """arguments: of `rxt-dist data`. makes: the folder that it makes."""

    arguments: tuple[str, ...]
    makes: Path


@dataclass(frozen=True)
class Link:
    """One link. work: its run, complete but for the topology, or its data job. origins: earlier links whose weights it
    takes, by name."""

    name: str
    work: RunConfig | DataJob
    origins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chain:
    """A chain of validated runs, each of which knows its `start`."""

    name: str
    output: Path
    links: tuple[Link, ...]

    @property
    def directory(self) -> Path:
        """The chain's own folder."""
        return self.output / self.name

    @property
    def runs(self) -> dict[str, RunConfig]:
        """The runs by the names of their links, in order."""
        return {link.name: link.work for link in self.links if isinstance(link.work, RunConfig)}

    def jobs_before(self, name: str) -> dict[str, DataJob]:
        """The data jobs before a link, by name."""
        names = [link.name for link in self.links]
        before = self.links[: names.index(name)]
        return {link.name: link.work for link in before if isinstance(link.work, DataJob)}

    def awaited_jobs(self, name: str) -> dict[str, DataJob]:
        """Those of them that make something the run of a link reads, or lies in."""
        data = self.runs[name].data
        read = [Path(os.path.abspath(path)) for path in (data.path, *phase_paths(data), data.tokenizer) if path]
        return {
            job: work
            for job, work in self.jobs_before(name).items()
            if any(path.is_relative_to(os.path.abspath(work.makes)) for path in read)
        }


def is_chain(path: Path) -> bool:
    """Whether a file describes a chain."""
    if path.is_dir():
        return False
    values = Tree.read(path).values
    return isinstance(values, dict) and "links" in values


def load_chain(path: Path, overrides: Sequence[str] = ()) -> Chain:
    """Read a chain and all its runs.

    Args:
        overrides: `output=DIR`, `common.a.b=c` for all runs, and `LINK.a.b=c` for one.

    Raises:
        ConfigError: for anything wrong in the files or overrides, with file and line and what is allowed.
    """
    tree = Tree.read(path)
    if isinstance(tree.values, dict) and "links" not in tree.values and "train" in tree.values:
        raise ConfigError(f"{path} is a run and no chain of runs: use `rxt-dist train {path}`, or name a chain's file.")
    links = tree.values.get("links") if isinstance(tree.values, dict) else None
    names = list(links) if isinstance(links, dict) else []
    for override in overrides:
        _override(tree, override, names)
    config = validated(ChainConfig, tree)
    _check_names(names, tree)
    found: list[Link] = []
    for name, link in config.links.items():
        if link.data is not None and link.makes is not None:
            found.append(Link(name, DataJob(link.data, link.makes)))
        else:
            found.append(_run_link(config, name, found, tree, path.parent))
    _check_directories(config, found)
    return Chain(config.name, config.output, tuple(found))


def _override(tree: Tree, override: str, names: Sequence[str]) -> None:
    """Apply one; `LINK.a.b=c` stands for `links.LINK.set.a.b=c`. A file that it names is relative to the current
    directory, as in an override of a run."""
    first, dot, rest = override.partition(".")
    if dot and first in names:
        override = f"links.{first}.set.{rest}"
    tree.override(override, joined=())
    *parents, key = override.partition("=")[0].split(".")
    if key in JOINED and (parents == ["common"] or parents[::2] == ["links", "set"]):
        holder = tree.values
        for parent in parents:
            holder = holder[parent]
        if isinstance(holder[key], str):
            holder[key] = os.path.abspath(holder[key])


def _check_names(names: Sequence[str], tree: Tree) -> None:
    for name in names:
        if not re.fullmatch(_NAME, name) or name in ChainConfig.model_fields:
            raise ConfigError(
                f"{tree.place(('links', name))}: '{name}' cannot be the name of a link: take letters, digits, _ and -, "
                f"and none of {', '.join(ChainConfig.model_fields)}, which name parts of a chain."
            )


def _run_link(config: ChainConfig, name: str, before: Sequence[Link], chain: Tree, base: Path) -> Link:
    """A run with what the chain says of it."""
    link = config.links[name]
    if isinstance(link.run, str):
        file = base / link.run
        tree = Tree.read(file, named_at=chain.place(("links", name, "run")))
        join_files(tree, file.parent)
    else:
        tree = chain.below("links", name, "run")
        join_files(tree, base)
    for laid in (chain.below("common"), chain.below("links", name, "set")):
        _lay(tree, laid, base)
    if isinstance(tree.values, dict):
        tree.replace("output", str(config.output), chain.place(("output",)))
        start = _start(tree, link, name, before, chain)
        if start is not _AS_IT_IS:
            tree.replace("start", start, chain.place(("links", name, "start")))
    run = run_of(tree)
    folders = {os.path.abspath(earlier.directory): other for other, earlier in _runs(before).items()}
    origins = run.start.origins if run.start else ()
    taken = [folders.get(os.path.abspath(origin.run)) for origin in origins if origin.run is not None]
    return Link(name, run, tuple(found for found in taken if found is not None))


def _runs(links: Sequence[Link]) -> dict[str, RunConfig]:
    return {link.name: link.work for link in links if isinstance(link.work, RunConfig)}


def _lay(tree: Tree, laid: Tree, base: Path) -> None:
    """Lay settings over a run. A file in the place of a section replaces it; what is written out is laid over it."""
    if not isinstance(tree.values, dict) or not isinstance(laid.values, dict):
        return
    for key in JOINED:
        if isinstance(laid.values.get(key), str):
            tree.values.pop(key, None)
    join_files(laid, base)
    tree.overlay(laid)


# ---------------------------------------------------------------------------------------------------------------------
# Whose weights a link takes
# ---------------------------------------------------------------------------------------------------------------------

_AS_IT_IS: Any = object()


def _start(tree: Tree, link: LinkConfig, name: str, before: Sequence[Link], chain: Tree) -> Any:
    """The `start` of a link; _AS_IT_IS: what its run file says."""
    given = tree.values.get("start")
    if "start" in link.model_fields_set:
        return None if link.start is None else _by_directory(link.start, name, before, chain)
    runs = _runs(before)
    if not runs or (given is not None and not isinstance(given, dict)):
        return _AS_IT_IS
    places = [given, *(given.get("also") or ())] if given else []
    if any(not isinstance(place, dict) or "export" in place for place in places):
        return _AS_IT_IS
    bare = Tree(tree.source, {key: value for key, value in tree.values.items() if key != "start"}, dict(tree.places))
    fresh = list(given.get("fresh") or ()) if given else []
    named = [part for place in places for part in place.get("parts") or ()]
    return _derived(named or list(run_of(bare).stage.parts()), fresh, runs)


def _derived(parts: Sequence[str], fresh: Sequence[str], runs: dict[str, RunConfig]) -> dict[str, Any] | None:
    """Each part from the last run that has it; the last of those runs stands first."""
    found: dict[str, list[str]] = {name: [] for name in reversed(runs)}
    for part in parts:
        holder = next((name for name in found if part in runs[name].stage.parts()), None)
        if holder is not None and part not in fresh:
            found[holder].append(part)
    places = [{"run": str(runs[name].directory), "parts": taken} for name, taken in found.items() if taken]
    if not places:
        return {"fresh": list(fresh)} if fresh else None
    return {**places[0], "also": places[1:], "fresh": list(fresh)}


def _by_directory(start: dict[str, Any], name: str, before: Sequence[Link], chain: Tree) -> dict[str, Any]:
    """A `start` of a chain, with the names of links replaced by their directories."""
    named = dict(start)
    if isinstance(start.get("also"), list):
        named["also"] = [_by_directory(o, name, before, chain) if isinstance(o, dict) else o for o in start["also"]]
    if "link" not in start:
        return named
    other, runs = named.pop("link"), _runs(before)
    place = f"{chain.place(('links', name, 'start', 'link'))}: link '{name}' begins with the weights of"
    if not isinstance(other, str):
        raise ConfigError(f"{place} {other!r}, which is no name: name one link; others go below `also`.")
    if {"run", "export"} & {key for key, value in named.items() if value is not None}:
        raise ConfigError(f"{place} '{other}' and of a run or export in one place: keep one, the other below `also`.")
    if other in runs:
        return {"run": str(runs[other].directory), **named}
    links = list(chain.values["links"])
    if other == name:
        raise ConfigError(f"{place} itself: name a link before it, or leave `start` out.")
    if other not in links:
        raise ConfigError(f"{place} '{other}', which is no link: they are {', '.join(links)}.{nearest(other, links)}")
    if links.index(other) > links.index(name):
        raise ConfigError(f"{place} '{other}', which comes after it, so that neither could begin: change their order.")
    raise ConfigError(f"{place} '{other}', which makes data and has none: name a link that is a run.")


def _check_directories(config: ChainConfig, links: Sequence[Link]) -> None:
    """Refuse two links of one directory, and a link that takes weights from a directory of a later one or its own."""
    own: dict[str, str] = {os.path.abspath(config.output / config.name): "the chain itself"}
    for name, run in _runs(links).items():
        other = own.setdefault(os.path.abspath(run.directory), f"link '{name}'")
        if other != f"link '{name}'":
            raise ConfigError(
                f"{other} and link '{name}' have one folder, {run.directory}: give one of them another name "
                f"({name}.name=...)."
            )
    later: dict[str, str] = {}
    for name, run in reversed(_runs(links).items()):
        later[os.path.abspath(run.directory)] = name
        for origin in run.start.origins if run.start else ():
            trains = later.get(os.path.abspath(origin.run)) if origin.run is not None else None
            if trains is not None:
                raise ConfigError(
                    f"link '{name}' begins with the weights of {origin.run}, which link '{trains}' trains, so that "
                    f"neither could begin: it must be a link before."
                )
