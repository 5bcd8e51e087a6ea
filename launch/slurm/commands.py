"""`rxt-dist launch slurm`, `slurm-data`, `status`, `stop`, `resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from launch.slurm.arguments import (
    Account,
    After,
    AtOnce,
    Chain,
    Conda,
    Constraint,
    Container,
    ContainerRuntime,
    CpuBind,
    CpusPerTask,
    DataFile,
    DataOverrides,
    DryRun,
    Env,
    Exclude,
    Exclusive,
    Follow,
    FollowJob,
    FromCheckpoint,
    GpusPerNode,
    GpuType,
    Gres,
    Launcher,
    Mem,
    MinNodes,
    Modules,
    Mount,
    Nodes,
    NoPreflight,
    NoRequeue,
    Now,
    Partition,
    Qos,
    RunDir,
    Sbatch,
    Signal,
    SignalLead,
    Site,
    Tasks,
    Time,
    Venv,
    Workers,
)
from rxt_dist.commands.arguments import AsJson, Overrides, RunFile, TimeLimited, with_time_limit


def slurm(
    run: RunFile,
    overrides: Overrides = None,
    nodes: Nodes = None,
    gpus_per_node: GpusPerNode = None,
    min_nodes: MinNodes = None,
    site: Site = None,
    dry_run: DryRun = False,
    follow: Follow = False,
    after: After = None,
    from_checkpoint: FromCheckpoint = None,
    time_limit: TimeLimited = None,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    time: Time = None,
    mem: Mem = None,
    gpu_type: GpuType = None,
    gres: Gres = None,
    cpus_per_task: CpusPerTask = None,
    cpu_bind: CpuBind = None,
    exclusive: Exclusive = False,
    sbatch: Sbatch = None,
    signal: Signal = None,
    signal_lead: SignalLead = None,
    no_requeue: NoRequeue = False,
    chain: Chain = None,
    no_preflight: NoPreflight = False,
    launcher: Launcher = None,
    module: Modules = None,
    conda: Conda = None,
    venv: Venv = None,
    env: Env = None,
    container: Container = None,
    container_runtime: ContainerRuntime = None,
    mount: Mount = None,
) -> None:
    """Train on a SLURM cluster, in as many jobs' times as it takes.

    Example: `rxt-dist launch slurm configs/run/rxt-beta.yaml --nodes 8 --partition gpu --time 24h`. The code and the
    resolved configuration are frozen into runs/NAME/job; the job saves before its time is over, is requeued, and goes
    on, until the run is finished. `rxt-dist launch status|stop|resume runs/NAME` afterwards.
    """
    given = {
        "nodes": nodes, "min_nodes": min_nodes, "gpus_per_node": gpus_per_node, "partition": partition,
        "account": account, "qos": qos, "constraint": constraint, "exclude": exclude, "time": time, "mem": mem,
        "gpu_type": gpu_type, "gres": gres, "cpus_per_task": cpus_per_task, "cpu_bind": cpu_bind, "signal": signal,
        "signal_lead": signal_lead, "chain": chain, "launcher": launcher, "conda": conda, "venv": venv,
        "container": container, "container_runtime": container_runtime, "sbatch": sbatch, "modules": module,
        "mounts": mount, "env": _variables(env), "exclusive": exclusive or None,
        "requeue": False if no_requeue else None, "preflight": False if no_preflight else None,
    }  # fmt: skip
    for_one = {"--after": after, "--from": from_checkpoint, "--follow": follow, "--time-limit": time_limit}
    _launch(run, overrides or [], site, given, for_one, dry_run)


def slurm_data(
    data: DataFile,
    overrides: DataOverrides = None,
    tasks: Tasks = None,
    at_once: AtOnce = None,
    site: Site = None,
    dry_run: DryRun = False,
    partition: Partition = None,
    account: Account = None,
    qos: Qos = None,
    constraint: Constraint = None,
    exclude: Exclude = None,
    time: Time = None,
    mem: Mem = None,
    cpus_per_task: Workers = None,
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
    from launch.slurm.options import array_options
    from rxt_dist.config.load import load_data

    given = {
        "tasks": tasks, "at_once": at_once, "partition": partition, "account": account, "qos": qos,
        "constraint": constraint, "exclude": exclude, "time": time, "mem": mem, "cpus_per_task": cpus_per_task,
        "sbatch": sbatch, "modules": module, "conda": conda, "venv": venv, "env": _variables(env),
    }  # fmt: skip
    options = array_options(site, _stated(given))
    wish = ArrayWish(data, load_data(data, overrides or []), options)
    if dry_run:
        typer.echo(render_array(wish, lambda text: typer.echo(text, err=True)), nl=False)
        return
    for text in submit_array(wish):
        typer.echo(text)


def status(
    run: RunDir,
    follow: FollowJob = False,
    as_json: AsJson = False,
) -> None:
    """What the job of a run does: state, why it waits, step, loss, tokens/s, what ended its lives, nodes avoided."""
    from launch.slurm.follow import follow_run, print_status

    if follow:
        raise typer.Exit(follow_run(run))
    print_status(run, as_json)


def stop(
    run: RunDir,
    now: Now = False,
) -> None:
    """Let a run save and end, for good; a job that waits in the queue is cancelled.

    It works by the file STOP, so it stops a run of `launch local` and of torchrun too.
    """
    from launch.slurm.follow import stop_run

    for text in stop_run(run, now):
        typer.echo(text)


def resume(
    run: RunDir,
    follow: Follow = False,
) -> None:
    """Submit a run again as it was: the same code, configuration and options; it goes on from its newest checkpoint.

    After a stop, a cancelled job, a crash loop or a mended cluster. With other code or options: `launch slurm`.
    """
    from launch.slurm.submit import resubmit

    _tell_of_submission(resubmit(run.absolute()), run)
    if follow:
        from launch.slurm.follow import follow_run

        raise typer.Exit(follow_run(run))


def _launch(
    file: Path,
    overrides: list[str],
    site: Path | None,
    given: dict[str, Any],
    for_one: dict[str, Any],
    dry_run: bool,
) -> None:
    """Submit a run or a chain, or show its script. for_one: the options that only a run of its own has."""
    from launch.slurm.submit import render, submit
    from rxt_dist.config.chain import is_chain
    from rxt_dist.config.load import load_run

    if is_chain(file):
        _launch_chain(_chain_wish(file, overrides, site, given, for_one), dry_run)
        return
    config = load_run(file, with_time_limit(overrides, for_one["--time-limit"]))
    wish = _wish(config, site, given, for_one["--after"], for_one["--from"])
    if dry_run:
        typer.echo(render(wish, lambda text: typer.echo(text, err=True)), nl=False)
        return
    _tell_of_submission(submit(wish, typer.echo), wish.run)
    if for_one["--follow"]:
        from launch.slurm.follow import follow_run

        raise typer.Exit(follow_run(wish.run))


def _chain_wish(
    file: Path, overrides: list[str], site: Path | None, given: dict[str, Any], for_one: dict[str, Any]
) -> Any:
    """A chain whose jobs all have the same options.

    Raises:
        ConfigError: an option is given that only a run of its own has.
    """
    from launch.slurm.chain import ChainWish
    from rxt_dist.config.chain import load_chain
    from rxt_dist.errors import ConfigError

    surplus = [name for name, value in for_one.items() if value]
    if surplus:
        raise ConfigError(f"{surplus[0]} belongs to one run, and {file} is a chain: leave it out, or name a run file.")
    chain = load_chain(file, overrides)

    def make(run: Any, after: list[Path]) -> Any:
        return _wish(run, site, dict(given), after, None)

    return ChainWish(file, overrides, chain, make)


def _launch_chain(wish: Any, dry_run: bool) -> None:
    from launch.slurm.chain import render_chain, submit_chain

    if dry_run:
        typer.echo(render_chain(wish, lambda text: typer.echo(text, err=True)), nl=False)
        return
    jobs = submit_chain(wish, typer.echo)
    typer.echo(f"submitted: {', '.join(jobs) or 'nothing, since nothing is left'}")


def _wish(
    config: Any,
    site: Path | None,
    given: dict[str, Any],
    after: list[Path] | None,
    checkpoint: str | None,
) -> Any:
    """What is to be submitted: of nodes and GPUs the option counts, then the site file, then the run's cluster."""
    from launch.slurm.options import SlurmOptions
    from launch.slurm.submit import Wish
    from rxt_dist.config.load import load_settings

    options = load_settings(SlurmOptions, site, _stated(given))
    for name, value in (("nodes", config.cluster.nodes), ("gpus_per_node", config.cluster.gpus_per_node)):
        if name not in options.model_fields_set:
            given[name] = value
    options = load_settings(SlurmOptions, site, _stated(given))
    cluster = config.cluster.model_copy(update={"nodes": options.nodes, "gpus_per_node": options.gpus_per_node})
    return Wish(config.model_copy(update={"cluster": cluster}), options, tuple(after or ()), checkpoint)


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
