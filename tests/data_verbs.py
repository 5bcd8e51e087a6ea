"""`rxt-dist data` as its tests call it."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from data_prep.commands import app


def run(*arguments: object) -> Result:
    """Run a verb of `rxt-dist data`."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def as_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    """Run a verb with --json: standard output must be one JSON object and nothing else."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, (result.output, result.exception)
    value = json.loads(result.stdout)
    assert isinstance(value, dict)
    return value
