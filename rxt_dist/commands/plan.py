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
    """Print parameters; for a run also memory per GPU, traffic, days, and what limits it under which layout."""
    from rxt_dist.config.load import is_model_file, load_model, load_run
    from rxt_dist.config.validate import settle_topology, validate_run
    from rxt_dist.limits import plan_layouts
    from rxt_dist.plan import plan_model, plan_run

    if is_model_file(file):
        result = plan_model(load_model(file, overrides or []))
    else:
        config = load_run(file, overrides or [])
        config = settle_topology(config, config.cluster.ranks)
        validate_run(config, config.cluster.ranks, None)
        result = plan_run(config)
        result["layouts"] = plan_layouts(config, result)
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
    console.print(_layouts(result["layouts"]))
    console.print(result["layouts"]["verdict"], highlight=False)
    for assumption in [*result["assumptions"], *result["layouts"]["assumptions"]]:
        console.print(f"  - {assumption}", highlight=False, style="dim")


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


def _layouts(layouts: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="What limits a step, in seconds (estimates)", title_justify="left")
    table.add_column("layout", no_wrap=True)
    for heading in ("GB", "arithmetic", "GPU links", "network", "at least", "in all"):
        table.add_column(heading, justify="right", no_wrap=True)
    own = layouts["own_estimate"]
    for layout in (own, *layouts["others_estimate"]):
        memory = _shown(layout["memory_bytes"], 1e9) + ("" if layout["fits"] else " NO")
        times = ("arithmetic_s", "gpu_links_s", "network_s", "lower_bound_s", "without_overlap_s")
        name = f"ZeRO {layout['zero']}, EP {layout['expert_parallel']}{' *' if layout is own else ''}"
        table.add_row(name, memory, *(f"{layout[time]:.2g}" for time in times))
    table.caption = "* the run's own. At least: arithmetic and traffic overlap. In all: they do not."
    return table


def _label(name: str) -> str:
    return name.replace("_", " ").replace("estimate", "(estimate)")


def _shown(value: int | bool, bytes_per_unit: float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value / bytes_per_unit:.2f}"


def _duration(days: float) -> str:
    return f"{days:.3g} days" if days >= 1 else f"{days * 24:.3g} hours"
