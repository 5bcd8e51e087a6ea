"""`rxt-dist config`: what a run is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rxt_dist.commands.arguments import AsJson, Overrides

app = typer.Typer(help="Show configurations.", no_args_is_help=True)

RESOLVED = "config.resolved.yaml"


@app.callback()
def _group() -> None:
    """Keep `show` a verb of its own: typer runs the only verb of a group without its name."""


@app.command()
def show(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, or a run file.")],
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Print the whole configuration of a run, with all defaults and overrides."""
    from rxt_dist.config.load import load_run, resolved_yaml

    config = load_run(run / RESOLVED if run.is_dir() else run, overrides or [])
    if as_json:
        typer.echo(json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False))
    else:
        typer.echo(resolved_yaml(config), nl=False)
