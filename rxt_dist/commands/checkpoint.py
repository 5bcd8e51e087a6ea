"""`rxt-dist checkpoint`: look at the checkpoints of a run and prove that they are whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson

if TYPE_CHECKING:
    from rxt_dist.checkpoint.store import CheckpointInfo, CheckpointStore

app = typer.Typer(no_args_is_help=True, help="List and verify the checkpoints of a run.")

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Run directory, for example runs/demo.")]


@app.command("list")
def list_checkpoints(run_dir: RunDir, as_json: AsJson = False) -> None:
    """List the checkpoints of RUN_DIR, oldest first.

    Sizes are of the files on disk. An `unfinished` folder is a save in progress or one that was interrupted: it is
    never loaded, and the next save removes it. Contents are not hashed; `verify` does that.

    Example: rxt-dist checkpoint list runs/demo
    """
    store = _store(run_dir)
    found = store.list()
    if as_json:
        typer.echo(json.dumps({"run": str(run_dir), "checkpoints": [_as_json(info) for info in found]}))
        return
    if not found:
        typer.echo(f"No checkpoints in {store.directory} yet.")
    for info in found:
        shown = {key: info.meta[key] for key in ("tokens", "ranks") if key in info.meta}
        meta = "  ".join(f"{key} {value:,}" for key, value in shown.items())
        typer.echo(f"{info.path.name:<18}  {_status(info):<10}  {info.bytes / 1e6:>12.1f} MB  {info.problem or meta}")


@app.command()
def verify(
    run_dir: RunDir,
    step: Annotated[int | None, typer.Option(help="Verify this step only; default: every committed one.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every file of the checkpoints of RUN_DIR and compare it with the manifest.

    Names each missing, resized or altered file, and ends with exit code 65 if there is one. A damaged checkpoint does
    no harm: a resume goes back to the newest valid one and says so.

    Example: rxt-dist checkpoint verify runs/demo --step 120
    """
    from rxt_dist.errors import CheckpointError, ExitCode

    store = _store(run_dir)
    steps = [info.step for info in store.list() if info.committed]
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{run_dir} has no committed checkpoint of step {step}; its steps are: {known}.")
    found = {chosen: store.verify(chosen) for chosen in (steps if step is None else [step])}
    damaged = any(found.values())
    if as_json:
        results = [{"step": chosen, "problems": problems} for chosen, problems in found.items()]
        typer.echo(json.dumps({"run": str(run_dir), "ok": not damaged, "checkpoints": results}))
    else:
        for chosen, problems in found.items():
            typer.echo(f"{store.folder(chosen).name}  {'DAMAGED' if problems else 'ok'}")
            for problem in problems:
                typer.echo(f"    {problem}")
        if not found:
            typer.echo(f"No committed checkpoints in {store.directory} yet.")
    if damaged:
        raise typer.Exit(int(ExitCode.DATA))


def _store(run_dir: Path) -> CheckpointStore:
    from rxt_dist.checkpoint.retention import MIN_KEEP
    from rxt_dist.checkpoint.store import CheckpointStore
    from rxt_dist.errors import CheckpointError

    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist, so {run_dir} is not a run directory with checkpoints. "
            f"Give the folder that contains config.resolved.yaml, for example runs/demo."
        )
    return CheckpointStore(directory, keep=MIN_KEEP)


def _status(info: CheckpointInfo) -> str:
    if not info.committed:
        return "unfinished"
    return "damaged" if info.problem else "committed"


def _as_json(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "step": info.step,
        "path": str(info.path),
        "committed": info.committed,
        "bytes": info.bytes,
        "meta": info.meta,
        "problem": info.problem,
    }
