"""The job script: one readable text, headed by what SLURM reads, ended by the process that decides everything else."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from launch.slurm.options import ArrayOptions, JobOptions, SlurmOptions
from rxt_dist.config.duration import seconds_of

_TEMPLATE = Template("""\
#!/bin/bash
# $title
# Written by `rxt-dist launch`. Submit it again with `sbatch $path`.
$header
# The job's process installs its own handlers; until then these signals must not end it.
trap '' USR1 USR2 HUP

$environment
# From here on the job is this process: it starts the ranks, passes signals on, and asks SLURM for another start.
exec $process
""")


# Names of the scripts in a submission's folder.
SUBMIT, CLOSE = "submit.sbatch", "close.sbatch"


@dataclass(frozen=True)
class Place:
    """Where a job lives. folder: of its submission, for script and output. directory: the current directory of the
    launch, from which relative paths count. code: the frozen code. python: the interpreter."""

    folder: Path
    directory: Path
    code: Path
    python: str


def run_script(name: str, options: SlurmOptions, lead: int, place: Place) -> str:
    """The script of a training job.

    Args:
        name: of the job. lead: seconds from the user signal to the end of its time.
    """
    nodes = str(options.nodes) if options.min_nodes is None else f"{options.min_nodes}-{options.nodes}"
    lines = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        *_tasks(options),
        *_gpus(options),
        *_common_lines(options, place, "%j"),
        f"--signal=B:{options.signal}@{lead}",
        "--requeue" if options.requeue else "--no-requeue",
        *(["--exclusive"] if options.exclusive else []),
        *options.sbatch,
    ]
    process = [place.python, "-m", "launch.slurm.supervisor", str(place.folder / "launch.json")]
    return _text(f"Training of {name}.", lines, options, place, process)


def _gpus(options: SlurmOptions) -> list[str]:
    if options.gres is not None:
        return [] if options.gres == "none" else [f"--gres={options.gres}"]
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    return [f"--gpus-per-node={kind}{options.gpus_per_node}"]


def _tasks(options: SlurmOptions) -> list[str]:
    """What makes SLURM give each node the CPUs of its ranks."""
    if options.min_nodes is None:
        return [f"--ntasks-per-node={options.gpus_per_node}", f"--cpus-per-task={options.cpus_per_task}"]
    # A number of tasks for each node makes SLURM content with the fewest nodes, however many are free.
    return [f"--cpus-per-task={options.gpus_per_node * options.cpus_per_task}"]


def array_script(name: str, options: ArrayOptions, place: Place, command: Sequence[str]) -> str:
    """The script of an array of jobs that build a dataset together.

    Args:
        command: arguments of `launch.slurm.data_task`.
    """
    at_once = "" if options.at_once is None else f"%{options.at_once}"
    lines = [
        f"--job-name={name}",
        f"--array=0-{options.tasks - 1}{at_once}",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={options.cpus_per_task}",
        *_common_lines(options, place, "%A_%a"),
        "--signal=B:USR2@60",
        "--requeue",
        *options.sbatch,
    ]
    process = [place.python, "-m", "launch.slurm.data_task", *command]
    return _text(f"One of {options.tasks} jobs that build {name}.", lines, options, place, process)


def closing_script(name: str, options: ArrayOptions, place: Place, command: Sequence[str]) -> str:
    """The script of the job that completes and verifies what an array has built."""
    lines = [
        f"--job-name={name}-close",
        "--nodes=1",
        "--ntasks=1",
        f"--cpus-per-task={options.cpus_per_task}",
        *_common_lines(options, place, "%j"),
        "--signal=B:USR2@60",
        "--requeue",
        *options.sbatch,
    ]
    process = [place.python, "-m", "launch.slurm.data_task", *command]
    return _text(f"Completes and verifies {name}.", lines, options, place, process, CLOSE)


def slurm_time(seconds: int) -> str:
    """A time limit as SLURM writes it."""
    days, rest = divmod(seconds, 86400)
    hours, rest = divmod(rest, 3600)
    return f"{days}-{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


def _common_lines(options: JobOptions, place: Place, job: str) -> Iterator[str]:
    yield f"--time={slurm_time(seconds_of(options.time))}"
    for key in ("partition", "account", "qos", "constraint", "exclude", "mem"):
        value = getattr(options, key)
        if value is not None:
            yield f"--{key}={value}"
    yield f"--chdir={place.directory}"
    yield f"--output={place.folder}/slurm-{job}.out"
    yield "--open-mode=append"


def _text(
    title: str, lines: Sequence[str], options: JobOptions, place: Place, process: Sequence[str], file: str = SUBMIT
) -> str:
    return _TEMPLATE.substitute(
        title=title,
        path=place.folder / file,
        header="\n".join(f"#SBATCH {line}" for line in lines),
        environment="\n".join(_environment(options, place)),
        process=shlex.join(process),
    )


def _environment(options: JobOptions, place: Place) -> Iterator[str]:
    if options.modules or options.conda is not None or options.venv is not None:
        yield "# Without its software a job would go on with whatever python is there."
    if options.modules:
        yield f"module load {' '.join(options.modules)} || exit"
    if options.conda is not None:
        yield 'source "$(conda info --base)/etc/profile.d/conda.sh" || exit'
        yield f"conda activate {shlex.quote(options.conda)} || exit"
    if options.venv is not None:
        yield f"source {shlex.quote(options.venv + '/bin/activate')} || exit"
    for name, value in options.env.items():
        yield f"export {name}={shlex.quote(value)}"
    yield "# The code as it was when this was submitted, whatever has changed since and lies in this directory."
    yield "export PYTHONSAFEPATH=1"
    yield f"export PYTHONPATH={shlex.quote(str(place.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
