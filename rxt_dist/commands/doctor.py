"""`rxt-dist doctor`: whether this machine can train."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from rxt_dist.commands.arguments import AsJson


def doctor(as_json: AsJson = False) -> None:
    """Check Python, packages, compiler, accelerator, disk and the facts about DeepSpeed that training relies on."""
    from rxt_dist.doctor import examine
    from rxt_dist.errors import ExitCode

    checks = examine()
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        from rich.console import Console
        from rich.table import Table

        table = Table("check", "status", "found", "what to do")
        colours = {"ok": "green", "warn": "yellow", "fail": "red"}
        for check in checks:
            table.add_row(check.name, f"[{colours[check.status]}]{check.status}", check.found, check.advice)
        Console().print(table)
    if any(check.status == "fail" for check in checks):
        raise typer.Exit(int(ExitCode.CONFIG))
