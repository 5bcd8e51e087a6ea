"""`rxt-dist diff`: where two runs begin to differ."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson

if TYPE_CHECKING:
    from rxt_dist.train.comparison import Comparison, RunRecord

_DIFFERENT = 1
_ROWS_SHOWN = 20


def diff(
    a: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory, for example runs/one.")],
    b: Annotated[Path, typer.Argument(metavar="RUN", help="Another one.")],
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Relative difference of figures up to which they count as equal.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Find the first step at which two runs differ, in what, and what was different around them.

    Compared are the lines of metrics.jsonl that both have, without what depends on the clock, and the checksums of the
    states of checkpoints that both have. Exit code 0: equal within the tolerance; 1: different. Differences of
    configuration and environment are told, but do not count; nor do those of checksums where there is a tolerance.

    Example: rxt-dist diff runs/one runs/two --tolerance 1e-5
    """
    from rxt_dist.errors import ConfigError
    from rxt_dist.train.comparison import compare_runs, read_run

    if not math.isfinite(tolerance):
        raise ConfigError(f"--tolerance is {tolerance}, but must be a number such as 1e-5.")
    runs = read_run(a), read_run(b)
    found = compare_runs(*runs, tolerance)
    equal = not found.fields and (tolerance > 0 or found.states_equal)
    if as_json:
        typer.echo(json.dumps(_as_json(runs, found, equal, tolerance), ensure_ascii=False, allow_nan=False))
    else:
        for line in _lines(runs, found, equal, tolerance):
            typer.echo(line)
    if not equal:
        raise typer.Exit(_DIFFERENT)


def _lines(runs: tuple[RunRecord, RunRecord], found: Comparison, equal: bool, tolerance: float) -> list[str]:
    names = tuple(zip("AB", runs, strict=True))
    lines = [f"{name}: {run.path}, up to step {run.last_step}" for name, run in names]
    within = f" within {tolerance:g}" if tolerance else ""
    told = (
        f"{found.lines} lines of metrics compared; {found.lines_of_one[0]} are only in A, {found.lines_of_one[1]} in B"
    )
    lines += [*found.remarks, told]
    if found.fields:
        lines.append(f"different from step {found.fields[0].step} on:")
        rows = [("figure", "step", "A", "B", "relative", "largest", "at step")]
        rows += [
            (
                one.name,
                str(one.step),
                _text(one.a),
                _text(one.b),
                f"{one.relative:.2g}",
                f"{one.largest:.2g}",
                str(one.largest_step),
            )
            for one in found.fields[:_ROWS_SHOWN]
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        if (more := len(found.fields) - _ROWS_SHOWN) > 0:
            lines.append(f"  and {more} more figures (--json has all)")
    else:
        lines.append(f"no figure differs{within}")
    for step, a, b in found.checksums:
        lines.append(f"state at step {step}: " + ("equal" if a == b else f"DIFFERENT (checksums {a} and {b})"))
    if not found.checksums:
        lines.append("state: no checkpoints of the same step that can be compared")
    for title, differences in (("configuration", found.settings), ("environment", found.surroundings)):
        lines.append(f"{title}:" if differences else f"{title}: equal")
        lines += [f"  {key}: {_known(a)}, {_known(b)}" for key, a, b in differences]
    lines.append(f"EQUAL{within}" if equal else "DIFFERENT")
    return lines


def _text(value: float | None) -> str:
    return "absent" if value is None else repr(value)


def _known(value: Any) -> str:
    return "absent" if value is None else str(value)


def _as_json(runs: tuple[RunRecord, RunRecord], found: Comparison, equal: bool, tolerance: float) -> dict[str, Any]:
    return {
        "equal": equal,
        "tolerance": tolerance,
        "runs": [{"path": str(run.path), "last_step": run.last_step} for run in runs],
        "lines": found.lines,
        "lines_of_one": list(found.lines_of_one),
        "first_step": found.fields[0].step if found.fields else None,
        "fields": [{key: _number(value) for key, value in vars(one).items()} for one in found.fields],
        "checkpoints": [{"step": step, "equal": a == b, "a": a, "b": b} for step, a, b in found.checksums],
        "configuration": [{"key": key, "a": a, "b": b} for key, a, b in found.settings],
        "environment": [{"key": key, "a": a, "b": b} for key, a, b in found.surroundings],
        "remarks": found.remarks,
    }


def _number(value: Any) -> Any:
    """JSON has no infinity: what is not finite is a text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
