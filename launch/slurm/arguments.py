"""Options of the verbs that launch on a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory (runs/NAME).")]
Site = Annotated[
    Path | None,
    typer.Option(
        metavar="SITE.yaml", help="Settings of the cluster for all launches; the options here count before it."
    ),
]
Partition = Annotated[str | None, typer.Option(help="Partition, or several with commas.", rich_help_panel="Cluster")]
Account = Annotated[str | None, typer.Option(help="Account that is charged.", rich_help_panel="Cluster")]
Qos = Annotated[str | None, typer.Option(help="Quality of service.", rich_help_panel="Cluster")]
Constraint = Annotated[str | None, typer.Option(help="Features that nodes must have.", rich_help_panel="Cluster")]
Exclude = Annotated[str | None, typer.Option(help="Nodes not to use.", rich_help_panel="Cluster")]
Time = Annotated[
    str | None, typer.Option(help="Time limit: 24h, 1d12h, 90m.", show_default="24h", rich_help_panel="Cluster")
]
Mem = Annotated[str | None, typer.Option(help="Memory of a node: 480G; 0: all.", rich_help_panel="Cluster")]
Sbatch = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LINE", help="A further line for sbatch: --sbatch=--mail-type=FAIL.", rich_help_panel="Cluster"
    ),
]
Modules = Annotated[
    list[str] | None, typer.Option("--module", help="Module to load.", rich_help_panel="Software of the job")
]
Conda = Annotated[
    str | None, typer.Option(help="conda environment to activate.", rich_help_panel="Software of the job")
]
Venv = Annotated[
    str | None,
    typer.Option(
        help="Virtual environment to activate.",
        show_default="the present python",
        rich_help_panel="Software of the job",
    ),
]
Env = Annotated[
    list[str] | None,
    typer.Option(metavar="A=B", help="Environment variable of the job.", rich_help_panel="Software of the job"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check, print the script, and stop: nothing is written.")]
Nodes = Annotated[int | None, typer.Option(help="Nodes.", show_default="cluster.nodes")]
GpusPerNode = Annotated[
    int | None, typer.Option(help="GPUs, and ranks, of a node.", show_default="cluster.gpus_per_node")
]
MinNodes = Annotated[int | None, typer.Option(help="Go on with so few nodes where no more are to be had.")]
Follow = Annotated[bool, typer.Option("--follow", help="Show state, step, loss and speed until the job ends.")]
After = Annotated[
    list[Path] | None,
    typer.Option(metavar="RUN_DIR", help="Start when that run is finished; several: when all are."),
]
FromCheckpoint = Annotated[
    str | None, typer.Option("--from", metavar="step-N", help="Begin at this checkpoint (see `train`).")
]
GpuType = Annotated[str | None, typer.Option(help="Type of GPU, as in a100.", rich_help_panel="Cluster")]
Gres = Annotated[
    str | None,
    typer.Option(help="Ask by --gres in place of --gpus-per-node; none: not at all.", rich_help_panel="Cluster"),
]
CpusPerTask = Annotated[int | None, typer.Option(help="CPUs of a rank.", show_default="8", rich_help_panel="Cluster")]
CpuBind = Annotated[
    str | None, typer.Option(help="How srun binds ranks.", show_default="cores", rich_help_panel="Cluster")
]
Exclusive = Annotated[
    bool, typer.Option("--exclusive", help="Whole nodes, which no other job shares.", rich_help_panel="Cluster")
]
Signal = Annotated[
    str | None,
    typer.Option(help="Signal before the time limit.", show_default="USR2", rich_help_panel="Surviving"),
]
SignalLead = Annotated[
    str | None,
    typer.Option(
        help="How long before the time limit it comes.",
        show_default="what the run needs, 5m at first",
        rich_help_panel="Surviving",
    ),
]
NoRequeue = Annotated[
    bool, typer.Option("--no-requeue", help="The site forbids requeues (see --chain).", rich_help_panel="Surviving")
]
Chain = Annotated[
    int | None,
    typer.Option(help="With --no-requeue: so many jobs, one after the other.", rich_help_panel="Surviving"),
]
NoPreflight = Annotated[
    bool, typer.Option("--no-preflight", help="Start ranks on unchecked nodes.", rich_help_panel="Surviving")
]
Launcher = Annotated[
    str | None,
    typer.Option(help="srun: a task for each GPU; torchrun: an agent for each node.", show_default="srun"),
]
Container = Annotated[str | None, typer.Option(help="Image in which ranks run.", rich_help_panel="Software of the job")]
ContainerRuntime = Annotated[
    str | None,
    typer.Option(help="apptainer or pyxis.", show_default="apptainer", rich_help_panel="Software of the job"),
]
Mount = Annotated[
    list[str] | None,
    typer.Option(help="Folder that ranks see in the container.", rich_help_panel="Software of the job"),
]
DataFile = Annotated[Path, typer.Argument(metavar="BUILD.yaml", help="Data file with `build:` (configs/data/*.yaml).")]
DataOverrides = Annotated[list[str] | None, typer.Argument(metavar="a.b=c", help="Overrides such as build.unit_mb=64.")]
Tasks = Annotated[int | None, typer.Option(help="Jobs of the array; may differ from try to try.")]
AtOnce = Annotated[int | None, typer.Option(help="So many of them at one time at most.")]
Workers = Annotated[
    int | None,
    typer.Option(help="CPUs, and worker processes, of a job.", show_default="8", rich_help_panel="Cluster"),
]
FollowJob = Annotated[bool, typer.Option("--follow", help="Until the job has ended, a line when something changes.")]
Now = Annotated[bool, typer.Option("--now", help="Cancel the job at once: work since its last save is lost.")]
