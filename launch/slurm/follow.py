"""What a run on a cluster does, for a person who asks: from the queue, the job's own files and the run's figures."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from launch.slurm import client
from launch.slurm.job import JobFolder
from launch.slurm.ledger import Ledger, excluded_nodes, lines_of
from rxt_dist.errors import ConfigError, ExitCode
from rxt_dist.finished import is_finished
from rxt_dist.locks import held
from rxt_dist.train.events import read_lines

_FOLLOW_SECONDS = 2.0
# A job that was submitted a moment ago, or is between two starts, may be unknown for a moment.
_GONE_LOOKS = 3
# The queue does not answer.
_UNKNOWN = "UNKNOWN"
_LIVING = (*client.ACTIVE, _UNKNOWN)


def status_of(run: Path) -> dict[str, Any]:
    """State of a run: its jobs in the queue, what the supervisor said last, figures, lives, nodes that are avoided.

    Raises:
        ConfigError: no run stands there.
    """
    _require_run(run)
    folder = JobFolder(run)
    description = folder.description()
    if description is None and not (run / "events.jsonl").exists():
        raise ConfigError(f"{run} holds no run that was launched. Name a run directory, such as runs/NAME.")
    jobs = [_job(job) for job in description.jobs] if description and client.there() else []
    lines = lines_of(Ledger(folder.ledger).read(), description.submission) if description else []
    ends = [line for line in lines if line["kind"] == "end"]
    figures = [line for line in read_lines(run / "metrics.jsonl") if "tokens_per_s" in line]
    known = ("step", "tokens", "tokens_per_s", "time")
    return {
        "run": str(run),
        "jobs": jobs,
        "supervisor": _json(folder.status),
        "newest": {name: figures[-1].get(name) for name in known} | {"loss": _loss(figures[-1])} if figures else {},
        "finished": is_finished(run),
        "trains": held(run / ".lock"),
        "lives": [
            {name: line.get(name) for name in ("life", "job", "code", "reason", "step", "action")} for line in ends
        ],
        "excluded": excluded_nodes(lines),
        "output": _output(folder, description.submission, description.jobs) if description else None,
    }


def _require_run(path: Path) -> None:
    """Refuse what cannot be a run directory: a file, and the folder of a chain, whose links have jobs of their own.

    Raises:
        ConfigError: with what to name.
    """
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder. Name a run directory, such as runs/NAME.")
    links = _json(path / "chain.json").get("links", {})
    runs = [folder for name, folder in links.items() if (path / f"links/{name}.yaml").exists()]
    if runs:
        raise ConfigError(
            f"{path} is the folder of a chain, whose links have jobs of their own: name one of {', '.join(runs)}. "
            f"Those after a link that is stopped do not start."
        )


def _job(job: str) -> dict[str, Any]:
    try:
        state = client.job_state(job)
    except client.SlurmError as error:
        # What the run's own files say is no less true.
        return {"job": job, "state": _UNKNOWN, "reason": str(error), "nodes": "", "start": ""}
    if state is not None:
        return {"job": job, "state": state.state, "reason": state.reason, "nodes": state.nodes, "start": state.started}
    return {"job": job, "state": client.last_state(job) or "ENDED", "reason": "", "nodes": "", "start": ""}


def _loss(line: dict[str, Any]) -> float | None:
    """Of the first term of the stage: they stand in its order."""
    losses = [value for name, value in line.items() if name.endswith("_loss") and "/" not in name]
    return losses[0] if losses and isinstance(losses[0], float) else None


def _output(folder: JobFolder, submission: int, jobs: list[str]) -> str | None:
    written = [folder.submission(submission) / f"slurm-{job}.out" for job in jobs]
    there = [path for path in written if path.exists()]
    return str(there[-1]) if there else None


def _json(path: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        value = json.loads(path.read_bytes())
        return value if isinstance(value, dict) else {}
    return {}


def headline(state: dict[str, Any]) -> str:
    """One line: what it does, and how far it is."""
    words = []
    active = [job for job in state["jobs"] if job["state"] in _LIVING]
    shown = active[0] if active else (state["jobs"][-1] if state["jobs"] else None)
    own = state["supervisor"]
    if shown is not None:
        words.append(f"job {shown['job']} {shown['state']}")
        if shown["state"] == _UNKNOWN:
            words.append(f"({shown['reason']})")
        if shown["state"] in client.WAITING and shown["reason"] not in ("None", ""):
            words.append(f"({shown['reason']})")
            words.append(f"expected to start at {shown['start']}" if shown["start"] not in ("N/A", "") else "")
        if shown["state"] == "RUNNING":
            words.append(f"on {shown['nodes']}, {own.get('state', 'starting')}")
        elif own.get("why") and shown["state"] not in (*client.WAITING, _UNKNOWN):
            words.append(f"({own.get('state')}: {own['why']})")
    elif not state["finished"]:
        words.append("training, without SLURM" if state["trains"] else "not running")
    if state["finished"]:
        words.append("finished")
    newest = state["newest"]
    if newest:
        loss = newest["loss"]
        words.append(f"| step {newest['step']:,}" + (f", loss {loss:.4f}" if isinstance(loss, float) else ""))
        words.append(f"{newest['tokens_per_s']:,.0f} tokens/s" if newest.get("tokens_per_s") else "")
    return " ".join(word for word in words if word)


def print_status(run: Path, as_json: bool) -> None:
    """All that is known of a run's jobs."""
    state = status_of(run)
    if as_json:
        print(json.dumps(state))
        return
    print(headline(state))
    for life in state["lives"][-5:]:
        code = "no code" if life["code"] is None else f"code {life['code']}"
        name = f"life {life['life']}" if life["life"] else "before a life"
        print(f"  {name} (job {life['job']}) ended at step {life['step']}, {code}: {life['reason']}")
    if state["excluded"]:
        print(f"  nodes that are avoided: {', '.join(state['excluded'])}")
    if state["output"]:
        print(f"  output: {state['output']}")


def follow_run(run: Path) -> int:
    """A line whenever something changes, until no job of the run is left; Ctrl-C leaves the job as it is.

    Returns:
        0 if the run is finished, else the code that its last life ended with.
    """
    last, gone = "", 0
    with suppress(KeyboardInterrupt):
        while True:
            state = status_of(run)
            line = headline(state)
            if line != last:
                print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
                last = line
            active = any(job["state"] in _LIVING for job in state["jobs"])
            gone = 0 if active else gone + 1
            if gone >= _GONE_LOOKS:
                codes = [life["code"] for life in state["lives"] if life["code"] is not None]
                return ExitCode.DONE if state["finished"] else int(codes[-1] if codes else ExitCode.CRASH)
            time.sleep(_FOLLOW_SECONDS)
    return ExitCode.DONE


def stop_run(run: Path, now: bool) -> Iterator[str]:
    """Stop a run, as gently as it is possible; what was done, a sentence each.

    Raises:
        ConfigError: nothing of it runs or waits.
    """
    _require_run(run)
    description = JobFolder(run).description()
    jobs = [_job(job) for job in description.jobs] if description and client.there() else []
    running = [job for job in jobs if job["state"] in _LIVING and job["state"] not in client.WAITING]
    waiting = [job for job in jobs if job["state"] in client.WAITING]
    trains = held(run / ".lock")
    if not (running or waiting or trains):
        raise ConfigError(f"Nothing of {run} runs or waits in the queue, so there is nothing to stop.")
    if running or trains:
        (run / "STOP").touch()
    for job in [*waiting, *(running if now else [])]:
        client.cancel(job["job"])
        yield f"job {job['job']} is cancelled"
    if (running or trains) and not now:
        yield f"{run} saves at its next step and ends, by its file STOP; nothing starts it again by itself"
    if description:
        yield f"`rxt-dist launch resume {run}` goes on"
