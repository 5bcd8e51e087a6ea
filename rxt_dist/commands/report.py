"""`rxt-dist report`: what runs did, as a page, as JSON, or in a terminal while it happens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from rxt_dist.commands.arguments import AsJson


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directories, for example runs/one; or that of a chain.")
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where report.html goes; the first run's folder if not given.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Watch one run in the terminal until it ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what runs did: figures, evaluations, experts, checkpoints, restarts, and where the wall time went.

    Writes report.html, which needs nothing else, and report/*.png. Runs may be training meanwhile; nothing else of
    them is written. --json prints the last figures and the goodput instead, and writes nothing.

    Example: rxt-dist report runs/one runs/two --out comparison
    """
    from rxt_dist.errors import ConfigError
    from rxt_dist.report.build import as_json as json_of
    from rxt_dist.report.build import read_series, write_report

    if follow:
        if len(runs) > 1 or out is not None or as_json:
            raise ConfigError("--follow watches one run in the terminal: give one RUN, without --out and --json.")
        from rxt_dist.report.follow import follow as follow_run

        follow_run(runs[0])
        return
    from rxt_dist.report.chain import runs_of

    now = time.time()
    series = read_series([run for place in runs for run in runs_of(place)], now)
    if as_json:
        text = json.dumps(json_of(series), ensure_ascii=False, allow_nan=False)
        # Half a character, as lines hold it where a name was no UTF-8, is printed as JSON's escape of it.
        typer.echo(text.encode("utf-8", "backslashreplace").decode())
        return
    typer.echo(write_report(series, out or runs[0], now))
