"""Arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Run file (configs/run/*.yaml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="a.b=c", help="Overrides such as train.total_tokens=1e6 optimizer.lr=3e-4."),
]
ChainFile = Annotated[Path, typer.Argument(metavar="CHAIN.yaml", help="Chain file (configs/chain/*.yaml).")]
ChainOverrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="LINK.a.b=c", help="Overrides: output=DIR, common.a.b=c for all runs, LINK.a.b=c for one."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Profiled = Annotated[
    int | None,
    typer.Option(
        "--profile",
        metavar="N",
        min=1,
        help="Profile N steps of this life, from its third on, into profile/ of the run directory.",
    ),
]
TimeLimited = Annotated[
    str | None,
    typer.Option(
        "--time-limit",
        metavar="3h50m",
        help="Save and end with exit code 75 before this much time has passed since the launch (train.time_limit).",
    ),
]


def with_time_limit(overrides: list[str] | None, time_limit: str | None) -> list[str]:
    """The overrides, and the one that the option stands for."""
    return [*(overrides or []), *([f"train.time_limit={time_limit}"] if time_limit is not None else [])]
