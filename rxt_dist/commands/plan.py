"""`rxt-dist plan`: what a model or a run needs, before anything is built."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson, Overrides

if TYPE_CHECKING:
    from rich.table import Table


def plan(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A run file or a model file.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print parameters; for a run also memory per GPU, traffic, days, and what limits it in which topology."""
    from rxt_dist.config.load import is_model_file, load_model, load_run
    from rxt_dist.config.validate import settle_topology, validate_run
    from rxt_dist.limits import plan_topologies
    from rxt_dist.plan import plan_model, plan_run

    if is_model_file(file):
        result = plan_model(load_model(file, overrides or []))
    else:
        config = load_run(file, overrides or [])
        config = settle_topology(config, config.cluster.ranks)
        validate_run(config, config.cluster.ranks, None)
        result = plan_run(config)
        result["topologies"] = plan_topologies(config, result)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console()
    console.print(_parameters(result))
    if "run" not in result:
        return
    console.print(_per_stage(result))
    time, batch = result["time"], result["batch"]
    per_step = f"{batch['global_rows']:,} rows in {batch['micro_batches_per_step']} micro-batches per rank"
    console.print(
        f"{batch['steps']:,} steps of {per_step}; {time['flops_per_token']:.3g} FLOP per token.\n"
        f"Estimate: {time['step_seconds_estimate']:.3g} s per step, {time['tokens_per_second_estimate']:,.0f} "
        f"tokens/s, {_duration(time['days_estimate'])}.",
        highlight=False,
    )
    console.print(_topologies(result["topologies"]))
    own, memory = result["topologies"]["own_estimate"], result["topologies"]["gpu_memory_gb"]
    console.print(
        f"The run takes {own['memory_bytes'] / 1e9:.3g} GB of a GPU's {memory:g}, and its steps are limited by "
        f"{own['limited_by']}. {result['topologies']['verdict']}",
        highlight=False,
    )
    console.print(_saves(result["checkpoint"]), highlight=False)
    for assumption in [*result["assumptions"], *result["topologies"]["assumptions"]]:
        console.print(f"  - {assumption}", highlight=False, style="dim")


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
    table = Table(f"{unit} per GPU", title=f"{result['run']}: memory, and traffic per step", title_justify="left")
    for stage in memory:
        table.add_column(stage.replace("_", " ").replace("zero", "ZeRO"), justify="right")
    for title, stages in (("", memory), ("sent: ", traffic)):
        for name in stages["zero_0"]:
            values = [stage[name] for stage in stages.values()]
            table.add_row(title + _label(name), *(_shown(value, bytes_per_unit) for value in values))
    return table


def _topologies(topologies: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="What limits a step, in seconds (estimates)", title_justify="left")
    table.add_column("topology", no_wrap=True)
    for heading in ("GB", "arithmetic", "links", "network", "at least", "in all"):
        table.add_column(heading, justify="right", no_wrap=True)
    own = topologies["own_estimate"]
    for topology in (own, *topologies["others_estimate"]):
        memory = _shown(topology["memory_bytes"], 1e9) + ("" if topology["fits"] else " NO")
        times = ("arithmetic_s", "gpu_links_s", "network_s", "lower_bound_s", "without_overlap_s")
        name = f"ZeRO {topology['zero']}, EP {topology['expert_parallel']}{' *' if topology is own else ''}"
        table.add_row(name, memory, *(f"{topology[time]:.2g}" for time in times))
    table.caption = "* the run's own. Links: inside a node. At least: all overlaps. In all: nothing does."
    return table


def _label(name: str) -> str:
    return name.replace("_", " ").replace("estimate", "(estimate)")


def _shown(value: int | bool, bytes_per_unit: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value / bytes_per_unit:.2f}"


def _duration(days: float) -> str:
    return f"{days:.3g} days" if days >= 1 else f"{days * 24:.3g} hours"
