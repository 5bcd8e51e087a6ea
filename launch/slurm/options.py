"""What a person tells SLURM about a job: the site's settings and the options of one launch, checked.

Every value ends up in a script that SLURM and bash read. So each is held against what its kind may consist of: a line
break in a partition's name would be another line of the script.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PositiveInt, model_validator

from rxt_dist.config.base import Config, at_most
from rxt_dist.config.duration import Duration, seconds_of
from rxt_dist.config.load import load_settings

# What the launcher decides itself, and how a person has a say in it.
_OWN_LINES = {
    "nodes": "--nodes",
    "N": "--nodes",
    "ntasks": "--nodes",
    "n": "--nodes",
    "ntasks-per-node": "--gpus-per-node",
    "gpus-per-node": "--gpus-per-node",
    "gpus": "--gpus-per-node",
    "G": "--gpus-per-node",
    "gres": "--gres",
    "cpus-per-task": "--cpus-per-task",
    "c": "--cpus-per-task",
    "partition": "--partition",
    "p": "--partition",
    "account": "--account",
    "A": "--account",
    "qos": "--qos",
    "q": "--qos",
    "constraint": "--constraint",
    "C": "--constraint",
    "exclude": "--exclude",
    "x": "--exclude",
    "time": "--time",
    "t": "--time",
    "signal": "--signal",
    "requeue": "--no-requeue",
    "no-requeue": "--no-requeue",
    "dependency": "--after or --chain",
    "d": "--after or --chain",
    "job-name": "name=...",
    "J": "name=...",
    "output": "",
    "o": "",
    "error": "",
    "e": "",
    "open-mode": "",
    "chdir": "",
    "D": "",
    "array": "",
    "a": "",
    "export": "--env",
    "wrap": "",
    "parsable": "",
    "no-kill": "",
    "k": "",
    "wait": "--follow",
    "W": "--follow",
    "test-only": "--dry-run",
    "clusters": "",
    "M": "",
    # A rank takes the GPU of its number on the node, so it has to see all of them; and ranks of a node follow one
    # another.
    "gpus-per-task": "--gpus-per-node",
    "gpus-per-socket": "--gpus-per-node",
    "ntasks-per-gpu": "--gpus-per-node",
    "gpu-bind": "",
    "tres-per-task": "--gpus-per-node",
    "distribution": "",
    "m": "",
}


def _made_of(pattern: str, example: str) -> AfterValidator:
    allowed = re.compile(pattern)

    def check(text: str) -> str:
        if len(text) > 1000 or not allowed.fullmatch(text):
            raise ValueError(f"{text[:40]!r} cannot stand in a job script; such a value looks like {example}")
        return text

    return AfterValidator(check)


def _extra_line(text: str) -> str:
    found = re.fullmatch(r"(--([a-z][a-z-]*)|-([A-Za-z]))([ =][ -~]*)?", text)
    if found is None or len(text) > 500:
        raise ValueError(f"{text[:40]!r} is no option of sbatch; one looks like --mail-type=FAIL")
    # The beginning of a name does for sbatch.
    own = [known for known in _OWN_LINES if known == found[3] or (found[2] and known.startswith(found[2]))]
    if own:
        instead = _OWN_LINES[own[0]]
        raise ValueError(f"{found[1]} is the launcher's to set{f': use {instead}' if instead else ''}")
    return text


def _plain(text: str) -> str:
    if len(text) > 4000 or not text.isprintable():
        raise ValueError(f"{text[:40]!r} is too long, or holds a line break or another control character")
    return text


Name = Annotated[str, _made_of(r"[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*", "gpu_a100")]
Kind = Annotated[str, _made_of(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a100")]
Expression = Annotated[str, _made_of(r"[A-Za-z0-9_][A-Za-z0-9_.,:&|!*()\[\]+-]*", "a100&nvlink")]
NodeList = Annotated[str, _made_of(r"[A-Za-z0-9_][A-Za-z0-9_.,\[\]-]*", "gpu[007-012],gpu020")]
Resource = Annotated[str, _made_of(r"[A-Za-z0-9_][A-Za-z0-9_.:,=-]*", "gpu:a100:8")]
Memory = Annotated[str, _made_of(r"\d+[KMGT]?", "480G, or 0 for all of a node")]
Module = Annotated[str, _made_of(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*", "cuda/12.4")]
Binding = Annotated[str, _made_of(r"[a-z][a-z0-9_:,x]*", "cores")]
VariableName = Annotated[str, _made_of(r"[A-Za-z_][A-Za-z0-9_]*", "NCCL_IB_HCA")]
Plain = Annotated[str, AfterValidator(_plain)]
# Whatever reads it later is no shell that would know `~`.
PlainPath = Annotated[str, AfterValidator(_plain), AfterValidator(os.path.expanduser)]
ExtraLine = Annotated[str, AfterValidator(_extra_line)]


class JobOptions(Config):
    """What jobs of any kind ask of a cluster; a site file states these once for all launches."""

    partition: Name | None = Field(None, description="Partition, or several with commas; null: the default one.")
    account: Name | None = Field(None, description="Account that is charged.")
    qos: Name | None = Field(None, description="Quality of service.")
    constraint: Expression | None = Field(None, description="Features that nodes must have.")
    exclude: NodeList | None = Field(None, description="Nodes not to use.")
    time: Duration = Field("24h", description="Time limit of the job: 24h, 1d12h, 90m.")
    mem: Memory | None = Field(
        None, description="Memory of a node: 480G, or 0 for all of it; null: the site's default."
    )
    modules: tuple[Module, ...] = Field((), description="Modules to load.")
    conda: PlainPath | None = Field(None, description="conda environment to activate.")
    venv: PlainPath | None = Field(None, description="Virtual environment to activate.")
    env: dict[VariableName, Plain] = Field({}, description="Environment variables of the job.")
    sbatch: tuple[ExtraLine, ...] = Field((), description="Further lines for sbatch, such as --mail-type=FAIL.")

    @model_validator(mode="after")
    def _one_environment(self) -> Self:
        if self.conda is not None and self.venv is not None:
            raise ValueError("conda and venv are both given, and one would hide the other: leave one out")
        return self

    @property
    def seconds(self) -> int:
        """The time limit."""
        return seconds_of(self.time)


class SlurmOptions(JobOptions):
    """What a training job asks of a cluster, and how its ranks are started and kept alive."""

    nodes: Annotated[PositiveInt, at_most(16_384)] = Field(1, description="Nodes.")
    min_nodes: PositiveInt | None = Field(
        None, description="Go on with so few nodes where fewer than `nodes` are to be had; null: with all or none."
    )
    gpus_per_node: Annotated[PositiveInt, at_most(256)] = Field(1, description="GPUs, and ranks, of a node.")
    gpu_type: Kind | None = Field(None, description="Type of GPU, as in --gpus-per-node=a100:8.")
    gres: Resource | None = Field(
        None, description="Ask for GPUs by this --gres in place of --gpus-per-node; none: the cluster counts no GPUs."
    )
    cpus_per_task: PositiveInt = Field(8, description="CPUs of a rank.")
    exclusive: bool = Field(False, description="Whole nodes, which no other job shares.")
    cpu_bind: Binding = Field("cores", description="How srun binds ranks to CPUs.")
    signal: Literal["USR1", "USR2", "HUP"] = Field("USR2", description="Signal before the time limit.")
    signal_lead: Duration | None = Field(
        None, description="How long before the time limit it comes; null: from what the run is known to need."
    )
    requeue: bool = Field(True, description="Whether the job may be requeued; where sites forbid it: no, and chain.")
    chain: Annotated[PositiveInt, at_most(1000)] = Field(
        1, description="Jobs that follow one another until all is trained."
    )
    launcher: Literal["srun", "torchrun"] = Field("srun", description="What starts ranks on the nodes.")
    container: PlainPath | None = Field(None, description="Image in which ranks run.")
    container_runtime: Literal["apptainer", "pyxis"] = Field("apptainer", description="What runs the image.")
    mounts: tuple[PlainPath, ...] = Field((), description="Folders that ranks see in the container.")
    preflight: bool = Field(True, description="Check all nodes before each start of the ranks.")

    @model_validator(mode="after")
    def _node_counts(self) -> Self:
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes ({self.min_nodes}) is more than nodes ({self.nodes}): lower it")
        if self.chain > 1 and self.requeue:
            raise ValueError("a chain takes the place of requeues: give --no-requeue with it, or leave it out")
        if self.gres is not None and self.gpu_type is not None:
            raise ValueError("gres and gpu_type both say which GPUs: write the type into gres, or leave gres out")
        if self.mounts and self.container is None:
            raise ValueError("mounts belong to a container: name its image, or leave them out")
        return self


class ArrayOptions(JobOptions):
    """What a data build asks of a cluster as an array of jobs."""

    tasks: Annotated[PositiveInt, at_most(100_000)] = Field(description="Jobs of the array.")
    at_once: PositiveInt | None = Field(None, description="How many of them run at one time at most; null: all.")
    cpus_per_task: PositiveInt = Field(8, description="CPUs, and worker processes, of a job.")


def array_options(site: Path | None, options: Mapping[str, Any]) -> ArrayOptions:
    """Options of an array: those of the command, and what a site file, which is one for all launches, states for jobs
    of any kind.

    Raises:
        ConfigError: as `load_settings`.
    """
    stated = load_settings(SlurmOptions, site, {})
    common = set(JobOptions.model_fields) & stated.model_fields_set
    return load_settings(ArrayOptions, None, stated.model_dump(mode="json", include=common) | dict(options))
