"""`rxt-dist launch slurm`, `slurm-data`, `status`, `stop`, `resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson, Overrides, RunFile, TimeLimited, with_time_limit

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


def slurm(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes.", show_default="cluster.nodes")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs, and ranks, of a node.", show_default="cluster.gpus_per_node")
    ] = None,
    min_nodes: Annotated[int | None, typer.Option(help="Go on with so few nodes where no more are to be had.")] = None,
    site: Site = None,
    dry_run: DryRun = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show state, step, loss and speed until the job ends.")
    ] = False,
    after: Annotated[Path | None, typer.Option(metavar="RUN_DIR", help="Start when that run is finished.")] = None,
    from_checkpoint: Annotated[
        str | None, typer.Option("--from", metavar="step-N", help="Begin at this checkpoint (see `train`).")
    ] = None,
    time_limit: TimeLimited = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    time: Time = None,
    mem: Mem = None,
    gpu_type: Annotated[str | None, typer.Option(help="Type of GPU, as in a100.", rich_help_panel="Cluster")] = None,
    gres: Annotated[
        str | None, typer.Option(help="Ask by --gres in place of --gpus-per-node.", rich_help_panel="Cluster")
    ] = None,
    cpus_per_task: Annotated[
        int | None, typer.Option(help="CPUs of a rank.", show_default="8", rich_help_panel="Cluster")
    ] = None,
    cpu_bind: Annotated[
        str | None, typer.Option(help="How srun binds ranks.", show_default="cores", rich_help_panel="Cluster")
    ] = None,
    exclusive: Annotated[
        bool, typer.Option("--exclusive", help="Whole nodes, which no other job shares.", rich_help_panel="Cluster")
    ] = False,
    sbatch: Sbatch = None,
    signal: Annotated[
        str | None,
        typer.Option(help="Signal before the time limit.", show_default="USR2", rich_help_panel="Surviving"),
    ] = None,
    signal_lead: Annotated[
        str | None,
        typer.Option(
            help="How long before the time limit it comes.",
            show_default="what the run needs, 5m at first",
            rich_help_panel="Surviving",
        ),
    ] = None,
    no_requeue: Annotated[
        bool, typer.Option("--no-requeue", help="The site forbids requeues (see --chain).", rich_help_panel="Surviving")
    ] = False,
    chain: Annotated[
        int | None,
        typer.Option(help="With --no-requeue: so many jobs, one after the other.", rich_help_panel="Surviving"),
    ] = None,
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", help="Start ranks on unchecked nodes.", rich_help_panel="Surviving")
    ] = False,
    launcher: Annotated[
        str | None,
        typer.Option(help="srun: a task for each GPU; torchrun: an agent for each node.", show_default="srun"),
    ] = None,
    module: Modules = None,
    conda: Conda = None,
    venv: Venv = None,
    env: Env = None,
    container: Annotated[
        str | None, typer.Option(help="Image in which ranks run.", rich_help_panel="Software of the job")
    ] = None,
    container_runtime: Annotated[
        str | None,
        typer.Option(help="apptainer or pyxis.", show_default="apptainer", rich_help_panel="Software of the job"),
    ] = None,
    mount: Annotated[
        list[str] | None,
        typer.Option(help="Folder that ranks see in the container.", rich_help_panel="Software of the job"),
    ] = None,
) -> None:
    """Train on a SLURM cluster, in as many jobs' times as it takes.

    Example: `rxt-dist launch slurm configs/run/rxt-beta.yaml --nodes 8 --partition gpu --time 24h`. The code and the
    resolved configuration are frozen into runs/NAME/job; the job saves before its time is over, is requeued, and goes
    on, until the run is finished. `rxt-dist launch status|stop|resume runs/NAME` afterwards.
    """
    from launch.slurm.submit import render, submit

    given = {
        "nodes": nodes, "min_nodes": min_nodes, "gpus_per_node": gpus_per_node, "partition": partition,
        "account": account, "qos": qos, "constraint": constraint, "exclude": exclude, "time": time, "mem": mem,
        "gpu_type": gpu_type, "gres": gres, "cpus_per_task": cpus_per_task, "cpu_bind": cpu_bind, "signal": signal,
        "signal_lead": signal_lead, "chain": chain, "launcher": launcher, "conda": conda, "venv": venv,
        "container": container, "container_runtime": container_runtime, "sbatch": sbatch, "modules": module,
        "mounts": mount, "env": _variables(env), "exclusive": exclusive or None,
        "requeue": False if no_requeue else None, "preflight": False if no_preflight else None,
    }  # fmt: skip
    wish = _wish(run, with_time_limit(overrides, time_limit), site, given, after, from_checkpoint)
    if dry_run:
        typer.echo(render(wish), nl=False)
        return
    jobs = submit(wish, lambda text: typer.echo(text))
    _tell_of_submission(jobs, wish.run)
    if follow:
        from launch.slurm.follow import follow_run

        raise typer.Exit(follow_run(wish.run))


def slurm_data(
    data: Annotated[Path, typer.Argument(metavar="BUILD.yaml", help="Data file with `build:` (configs/data/*.yaml).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="a.b=c", help="Overrides such as build.unit_mb=64.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(help="Jobs of the array; may differ from try to try.")] = None,
    at_once: Annotated[int | None, typer.Option(help="So many of them at one time at most.")] = None,
    site: Site = None,
    dry_run: DryRun = False,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    time: Time = None,
    mem: Mem = None,
    cpus_per_task: Annotated[
        int | None,
        typer.Option(help="CPUs, and worker processes, of a job.", show_default="8", rich_help_panel="Cluster"),
    ] = None,
    sbatch: Sbatch = None,
    module: Modules = None,
    conda: Conda = None,
    venv: Venv = None,
    env: Env = None,
) -> None:
    """Build a dataset with an array of jobs; one more job completes what is left, and verifies all of it.

    Example: `rxt-dist launch slurm-data configs/data/beta-400b.yaml --tasks 64`. A job that is killed leaves finished
    units finished. The same command again, with any number of tasks, goes on, and ends in the same bytes.
    """
    from launch.slurm.array import ArrayWish, render_array, submit_array
    from launch.slurm.options import ArrayOptions
    from rxt_dist.config.load import load_data, load_settings

    given = {
        "tasks": tasks, "at_once": at_once, "partition": partition, "account": account, "qos": qos,
        "constraint": constraint, "exclude": exclude, "time": time, "mem": mem, "cpus_per_task": cpus_per_task,
        "sbatch": sbatch, "modules": module, "conda": conda, "venv": venv, "env": _variables(env),
    }  # fmt: skip
    options = load_settings(ArrayOptions, site, _stated(given))
    wish = ArrayWish(data, tuple(overrides or ()), load_data(data, overrides or []), options)
    if dry_run:
        typer.echo(render_array(wish), nl=False)
        return
    for text in submit_array(wish):
        typer.echo(text)


def status(
    run: RunDir,
    follow: Annotated[
        bool, typer.Option("--follow", help="Until the job has ended, a line when something changes.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What the job of a run does: state, why it waits, step, loss, tokens/s, what ended its lives, nodes avoided."""
    from launch.slurm.follow import follow_run, print_status

    if follow:
        raise typer.Exit(follow_run(run))
    print_status(run, as_json)


def stop(
    run: RunDir,
    now: Annotated[
        bool, typer.Option("--now", help="Cancel the job at once: work since its last save is lost.")
    ] = False,
) -> None:
    """Let a run save and end, for good; a job that waits in the queue is cancelled.

    It works by the file STOP, so it stops a run of `launch local` and of torchrun too.
    """
    from launch.slurm.follow import stop_run

    for text in stop_run(run, now):
        typer.echo(text)


def resume(
    run: RunDir,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show state, step, loss and speed until the job ends.")
    ] = False,
) -> None:
    """Submit a run again as it was: the same code, configuration and options; it goes on from its newest checkpoint.

    After a stop, a cancelled job, a crash loop or a mended cluster. With other code or options: `launch slurm`.
    """
    from launch.slurm.submit import resubmit

    _tell_of_submission(resubmit(run.absolute()), run)
    if follow:
        from launch.slurm.follow import follow_run

        raise typer.Exit(follow_run(run))


def _wish(
    run: Path,
    overrides: list[str],
    site: Path | None,
    given: dict[str, Any],
    after: Path | None,
    checkpoint: str | None,
) -> Any:
    """What is to be submitted: of nodes and GPUs the option counts, then the site file, then the run's cluster."""
    from launch.slurm.options import SlurmOptions
    from launch.slurm.submit import Wish
    from rxt_dist.config.load import load_run, load_settings

    config = load_run(run, overrides)
    options = load_settings(SlurmOptions, site, _stated(given))
    for name, value in (("nodes", config.cluster.nodes), ("gpus_per_node", config.cluster.gpus_per_node)):
        if name not in options.model_fields_set:
            given[name] = value
    options = load_settings(SlurmOptions, site, _stated(given))
    cluster = config.cluster.model_copy(update={"nodes": options.nodes, "gpus_per_node": options.gpus_per_node})
    return Wish(config.model_copy(update={"cluster": cluster}), options, after, checkpoint)


def _stated(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _variables(given: list[str] | None) -> dict[str, str] | None:
    """A=B as a mapping.

    Raises:
        ConfigError: one has no `=`.
    """
    from rxt_dist.errors import ConfigError

    wrong = [text for text in given or () if "=" not in text]
    if wrong:
        raise ConfigError(f"--env is '{wrong[0]}', but it has the form NAME=VALUE, as in NCCL_IB_HCA=mlx5.")
    return dict(text.split("=", 1) for text in given) if given else None


def _tell_of_submission(jobs: list[str], run: Path) -> None:
    many = f"jobs {', '.join(jobs)}, one after the other" if len(jobs) > 1 else f"job {jobs[0]}"
    typer.echo(
        f"submitted: {many}\n"
        f"  follow it: rxt-dist launch status {run} --follow\n"
        f"  stop it:   rxt-dist launch stop {run}"
    )
