"""`rxt-dist checkpoint`: look at the checkpoints of a run, prove that they are whole, and prune them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rxt_dist.commands.arguments import AsJson
from rxt_dist.commands.exchange import export

if TYPE_CHECKING:
    from rxt_dist.checkpoint.retention import Retention
    from rxt_dist.checkpoint.store import CheckpointInfo, CheckpointStore

app = typer.Typer(no_args_is_help=True, help="List, verify, prune and export the checkpoints of a run.")
# The same verb, where somebody looks for it beside the others.
app.command("export-weights")(export)

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
        aside = [str(path) for path in store.aside()]
        typer.echo(
            json.dumps({"run": str(run_dir), "checkpoints": [_as_json(info) for info in found], "set_aside": aside})
        )
        return
    if not found:
        typer.echo(f"No checkpoints in {store.directory} yet.")
    for info in found:
        shown = {key: info.meta[key] for key in ("tokens", "ranks") if key in info.meta}
        meta = "  ".join(f"{key} {value:,}" for key, value in shown.items())
        typer.echo(f"{info.path.name:<18}  {_status(info):<10}  {info.bytes / 1e6:>12.1f} MB  {info.problem or meta}")
    for path in store.aside():
        typer.echo(f"{path.name}  kept; no start looks at it")


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
    listed = {info.step: info for info in store.list() if info.committed}
    steps = list(listed)
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps)) or "none"
        raise CheckpointError(f"{run_dir} has no committed checkpoint of step {step}; its steps are: {known}.")
    found = {chosen: store.verify(chosen) for chosen in (steps if step is None else [step])}
    # A run that is being trained prunes: manifests go first.
    gone = [chosen for chosen in found if not listed[chosen].problem and not store.has_manifest(chosen)]
    found = {chosen: problems for chosen, problems in found.items() if chosen not in gone}
    damaged = any(found.values())
    if as_json:
        results = [{"step": chosen, "problems": problems} for chosen, problems in found.items()]
        typer.echo(json.dumps({"run": str(run_dir), "ok": not damaged, "checkpoints": results}))
    else:
        for chosen, problems in found.items():
            typer.echo(f"{store.folder(chosen).name}  {'DAMAGED' if problems else 'ok'}")
            for problem in problems:
                typer.echo(f"    {problem}")
        for chosen in gone:
            typer.echo(f"{store.folder(chosen).name}  removed meanwhile")
        if not (found or gone):
            typer.echo(f"No committed checkpoints in {store.directory} yet.")
    if damaged:
        raise typer.Exit(int(ExitCode.DATA))


@app.command()
def prune(
    run_dir: RunDir,
    keep: Annotated[int | None, typer.Option(min=2, help="Newest to keep; default: as the run is configured.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
) -> None:
    """Remove checkpoints of RUN_DIR that do not have to stay, after those that stay have been verified.

    Milestones and the best checkpoint stay as the run is configured. What was set aside is not touched.

    Example: rxt-dist checkpoint prune runs/demo --keep 2 --dry-run
    """
    from rxt_dist.files import access_errors

    store = _store(run_dir, lambda: _retention(run_dir, keep))
    with access_errors(run_dir), _untrained(run_dir, dry_run):
        verified: set[int] = set()
        while unknown := store.reasons().keys() - verified:
            for step in unknown:
                store.note(step, sound=not store.verify(step))
            verified |= unknown
        reasons = store.reasons()
        for path in store.prune(remove=not dry_run):
            typer.echo(f"{path.name}  {'would go' if dry_run else 'removed'}")
    for step in store.steps():
        typer.echo(f"{store.folder(step).name}  {reasons.get(step, 'does not have to stay')}")


@contextmanager
def _untrained(run_dir: Path, dry_run: bool) -> Iterator[None]:
    """Refuse a run that is being trained, and keep launches out meanwhile; a dry run only looks, as it writes nothing,
    no lock either."""
    from rxt_dist.errors import ConfigError
    from rxt_dist.locks import Lock, held, locked

    path = run_dir / ".lock"
    busy = ConfigError(f"{run_dir} is being trained, and prunes its checkpoints itself. Stop it first.")
    if dry_run:
        if held(path):
            raise busy
        yield
        return
    with locked(path) as lock:
        if lock is Lock.BUSY:
            raise busy
        if lock is Lock.UNSUPPORTED:
            typer.echo(f"warning: the file system of {run_dir} knows no locks; see that nobody trains it.", err=True)
        yield


def _store(run_dir: Path, retention: Callable[[], Retention] | None = None) -> CheckpointStore:
    """The checkpoints of a run; with what it keeps, for who removes some.

    Raises:
        CheckpointError: there are none.
    """
    from rxt_dist.checkpoint.retention import MIN_KEEP, Retention
    from rxt_dist.checkpoint.store import CheckpointStore
    from rxt_dist.errors import CheckpointError

    directory = run_dir / "checkpoints"
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist, so {run_dir} is not a run directory with checkpoints. "
            f"Give the folder that contains config.resolved.yaml, for example runs/demo."
        )
    kept = retention() if retention else Retention(MIN_KEEP)
    return CheckpointStore(directory, kept.keep, milestone_tokens=kept.milestone_tokens, keep_best=kept.keep_best)


def _retention(run_dir: Path, keep: int | None) -> Retention:
    """What a run is configured to keep.

    Raises:
        CheckpointError: that cannot be known, and to guess would remove milestones.
    """
    import yaml

    from rxt_dist.checkpoint.retention import Retention
    from rxt_dist.config.run import CheckpointConfig
    from rxt_dist.errors import CheckpointError

    path = run_dir / "config.resolved.yaml"
    try:
        kept = CheckpointConfig(**yaml.safe_load(path.read_text(encoding="utf-8"))["checkpoint"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{path} does not say which checkpoints stay ({type(error).__name__}), so that nothing is removed. Start "
            f"the run once, which writes it anew."
        ) from error
    return Retention(keep or kept.keep, kept.milestone_tokens, kept.keep_best)


def _status(info: CheckpointInfo) -> str:
    if not info.committed:
        return "unfinished"
    if info.problem:
        return "damaged"
    return "suspect" if info.meta.get("suspect") else "committed"


def _as_json(info: CheckpointInfo) -> dict[str, Any]:
    return {
        "step": info.step,
        "path": str(info.path),
        "committed": info.committed,
        "bytes": info.bytes,
        "meta": info.meta,
        "problem": info.problem,
    }
