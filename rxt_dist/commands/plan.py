"""`rxt-dist plan`: what a model or a run needs, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson, Overrides

if TYPE_CHECKING:
    from rich.table import Table

# Of all settings so many are shown; --json has all.
_SHOWN = 8


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file, a chain file or a model file.")],
    overrides: Overrides = None,
    cluster: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Plan for this cluster (configs/cluster/*.yaml) instead of the run's own."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print parameters; for a run also memory per GPU, traffic, days, cost, and all settings that it could have.

    For a chain: tokens, days and memory of each link, and their sums.
    """
    from rxt_dist.config.chain import is_chain, load_chain
    from rxt_dist.config.load import is_model_file, load_model, load_run
    from rxt_dist.config.validate import settle_topology, validate_run
    from rxt_dist.errors import ConfigError
    from rxt_dist.plan.chain import plan_chain
    from rxt_dist.plan.run import plan_model, plan_run

    if is_chain(file):
        common = [] if cluster is None else [f"common.cluster={json.dumps(str(cluster))}"]
        result = plan_chain(load_chain(file, [*common, *(overrides or [])]))
    elif is_model_file(file):
        if cluster is not None:
            raise ConfigError(
                f"{file} describes a model, which has no cluster: leave --cluster out, or give a run file."
            )
        result = plan_model(load_model(file, overrides or []))
    else:
        # First, so that an override may change a value of the cluster.
        joined = [] if cluster is None else [f"cluster={json.dumps(str(cluster))}"]
        config = load_run(file, [*joined, *(overrides or [])])
        config = settle_topology(config, config.cluster.ranks)
        validate_run(config, config.cluster.ranks, None)
        result = plan_run(config)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    if "chain" in result:
        console.print(_links(result))
        return
    console.print(_parameters(result))
    if "run" not in result:
        return
    console.print(_per_stage(result))
    console.print(_work(result), highlight=False)
    settings = result["settings"]
    console.print(_settings(settings))
    if settings["refused_estimate"]:
        console.print(_refused(settings["refused_estimate"]), highlight=False)
    own = settings["own_estimate"]
    console.print(
        f"The run takes {own['memory_bytes'] / 1e9:.3g} GB of a GPU's {settings['gpu_memory_gb']:g}, and its steps are "
        f"limited by {own['limited_by']}. {settings['verdict']}",
        highlight=False,
    )
    console.print(_saves(result["checkpoint"]), highlight=False)
    for assumption in [*result["assumptions"], *settings["assumptions"]]:
        console.print(f"  - {assumption}", highlight=False, style="dim")


def _links(result: dict[str, Any]) -> Table:
    """A line for each link of a chain, and their sums."""
    from rich.table import Table

    table = Table(title=f"chain {result['chain']}: estimates", caption="GB: memory of a GPU")
    for column in ("link", "GPUs", "10⁹ tokens", "steps", "time", "GPU-hours", "GB"):
        table.add_column(column, justify="left" if column == "link" else "right", no_wrap=True)
    for link in [*result["links"], {"link": "all", "ranks": "", **result["total"]}]:
        table.add_row(
            link["link"],
            str(link["ranks"]),
            f"{link['tokens'] / 1e9:.4g}",
            f"{link['steps']:,}",
            _duration(link["days_estimate"]),
            f"{link['gpu_hours_estimate']:.3g}",
            f"{link['memory_bytes_estimate'] / 1e9:.3g}",
            end_section=link is result["links"][-1],
        )
    return table


def _work(result: dict[str, Any]) -> str:
    """Steps, operations, time and cost."""
    time, batch, cost = result["time"], result["batch"], result["cost"]
    per_step = f"{batch['global_rows']:,} rows in {batch['micro_batches_per_step']} micro-batches per rank"
    whole = time["flops_per_token"]
    shares = ", ".join(
        f"{part.replace('_', ' ')} {count / whole:.0%}" for part, count in result["flops_per_token"].items() if count
    )
    price = "" if cost["usd_estimate"] is None else f", {cost['usd_estimate']:,.0f} dollars"
    return (
        f"{batch['steps']:,} steps of {per_step}; {whole:.3g} FLOP per token: {shares}.\n"
        f"Estimate: {time['step_seconds_estimate']:.3g} s per step, {time['tokens_per_second_estimate']:,.0f} "
        f"tokens/s, {_duration(time['days_estimate'])}; with saves and failures "
        f"{_duration(cost['days_with_losses_estimate'])}, {cost['gpu_hours_estimate']:,.0f} GPU-hours{price}."
    )


def _saves(plan: dict[str, Any]) -> str:
    """What checkpoints cost, and how often to make them."""
    costs = "measured in this run" if plan["cost"] == "measured" else "estimates"
    return (
        f"A checkpoint is {plan['bytes'] / 1e9:.3g} GB; a save stops training for {plan['stall_seconds']:.2g} s and is "
        f"written after {plan['written_seconds']:.3g} ({costs}). At a failure every "
        f"{plan['hours_between_failures']:,.0f} hours the best interval (Daly) is "
        f"{plan['best_interval_seconds'] / 60:.2g} minutes, checkpoint.every_tokens="
        f"{plan['best_interval_tokens_estimate']:,}, which loses {plan['lost_share_at_best']:.2%} of the time; the "
        f"run's own, {plan['own_interval_seconds_estimate'] / 60:.2g} minutes, loses "
        f"{plan['lost_share_at_own_estimate']:.2%}."
    )


def _parameters(result: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table("part", title=f"Parameters of {result['model']}", title_justify="left")
    for heading in ("total", "active per token"):
        table.add_column(heading, justify="right")
    for part, count in result["parameters"].items():
        table.add_row(part.replace("_", " "), f"{count['total']:,}", f"{count['active']:,}")
    table.caption = (
        "The system is decoder, encoder and memory attention with one embedding; the MLM head is pre-training's."
    )
    return table


def _per_stage(result: dict[str, Any]) -> Table:
    from rich.table import Table

    memory, traffic = result["memory_per_gpu_bytes"], result["traffic_per_gpu_per_step_bytes"]
    small = max(stage["total_estimate"] for stage in memory.values()) < 1e9
    unit, bytes_per_unit = ("MB", 1e6) if small else ("GB", 1e9)
    title = f"{result['run']} on {result['cluster']}: memory, and traffic per step"
    table = Table(f"{unit} per GPU", title=title, title_justify="left")
    for stage in memory:
        table.add_column(stage.replace("_", " ").replace("zero", "ZeRO"), justify="right")
    for title, stages in (("", memory), ("sent: ", traffic)):
        for name in stages["zero_0"]:
            values = [stage[name] for stage in stages.values()]
            table.add_row(title + _label(name), *(_shown(value, bytes_per_unit) for value in values))
    return table


def _settings(settings: dict[str, Any]) -> Table:
    """The best settings, and the run's own wherever it stands."""
    from rich import box
    from rich.table import Table

    ordered, own = settings["ranked_estimate"], settings["own_estimate"]
    number = len(ordered) + len(settings["refused_estimate"])
    title = f"Best of {number} settings; times of a step in seconds (estimates)"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("", "ZeRO", "EP", "rows", "kept", "GB", "arithmetic", "links", "network", "at least", "in all"):
        table.add_column(heading, justify="right", no_wrap=True)
    shown = list(enumerate(ordered[:_SHOWN], start=1))
    if settings["own_rank"] is None or settings["own_rank"] > _SHOWN:
        shown.append((settings["own_rank"], own))
    for place, setting in shown:
        times = ("arithmetic_s", "gpu_links_s", "network_s", "lower_bound_s", "without_overlap_s")
        table.add_row(
            f"{'*' if setting == own else ''}{place or 'NO'}",
            *(str(setting[name]) for name in ("zero", "expert_parallel", "micro_rows")),
            "no" if setting["recompute"] else "yes",
            f"{setting['memory_bytes'] / 1e9:.1f}",
            *(f"{setting[time]:.2g}" for time in times),
        )
    table.caption = (
        "* the run's own; NO: does not fit. Rows: of a micro-batch. Kept: no layer is recomputed. Links: inside a node."
        " At least: all overlaps. In all: nothing does."
    )
    return table


def _refused(refused: list[dict[str, Any]]) -> str:
    """How many do not fit, and the reason of the one that is nearest to fitting and of the farthest."""
    ordered = sorted(refused, key=lambda setting: setting["memory_bytes"])
    examples = [ordered[0]] if len(ordered) == 1 else [ordered[0], ordered[-1]]
    lines = [
        f"  ZeRO {each['zero']}, EP {each['expert_parallel']}, {each['micro_rows']} rows, "
        f"{'recomputed' if each['recompute'] else 'kept'}: {each['refused']}"
        for each in examples
    ]
    return "\n".join([f"{len(refused)} do not fit (--json lists all), from the smallest to the largest:", *lines])


def _label(name: str) -> str:
    return name.replace("_", " ").replace("estimate", "(estimate)")


def _shown(value: int | bool, bytes_per_unit: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value / bytes_per_unit:.2f}"


def _duration(days: float) -> str:
    return f"{days:.3g} days" if days >= 1 else f"{days * 24:.3g} hours"
