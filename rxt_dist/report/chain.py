"""How far a chain is: one line a link, from the files of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rxt_dist.config.chain import Chain, DataJob, load_chain
from rxt_dist.config.run import RunConfig
from rxt_dist.errors import ConfigError
from rxt_dist.finished import is_finished
from rxt_dist.locks import held
from rxt_dist.report.records import JsonLines
from rxt_dist.train.chain_dir import ChainDirectory


def link_states(chain: Chain) -> list[dict[str, Any]]:
    """Of each link: its name, kind and folder, its state and what ended its last life.

    `state` is finished, running, stopped (begun, and nobody trains it) or waiting.

    Raises:
        ConfigError, DiskError: a file of a run cannot be read.
    """
    folder = ChainDirectory(chain)
    return [
        _job_state(link.name, link.work, folder) if isinstance(link.work, DataJob) else _run_state(link.name, link.work)
        for link in chain.links
    ]


def _job_state(name: str, job: DataJob, folder: ChainDirectory) -> dict[str, Any]:
    state = "finished" if folder.job_is_done(name) else "waiting"
    return {"link": name, "kind": "data", "folder": str(job.makes), "state": state}


def _run_state(name: str, run: RunConfig) -> dict[str, Any]:
    lines = [line for line in JsonLines(run.directory / "metrics.jsonl").read()[1] if "tokens" in line]
    events = JsonLines(run.directory / "events.jsonl").read()[1]
    ends = [event for event in events if event.get("kind") == "exit"]
    if held(run.directory / ".lock"):
        state = "running"
    elif is_finished(run.directory):
        state = "finished"
    else:
        state = "stopped" if events else "waiting"
    known = {"step": "step", "tokens": "tokens", "tokens_per_s": "tokens_per_s"}
    figures = {key: lines[-1].get(key) for key in known} if lines else {}
    last = {key: ends[-1].get(key) for key in ("code", "reason")} if ends and state == "stopped" else {}
    return {
        "link": name,
        "kind": run.stage.kind,
        "folder": str(run.directory),
        "state": state,
        "total_tokens": run.train.total_tokens,
        **figures,
        **last,
    }


def status_lines(states: list[dict[str, Any]]) -> list[str]:
    """The states for a person."""
    width = max(len(state["link"]) for state in states)
    lines = []
    for state in states:
        done = f", {state['tokens']:,} of {state['total_tokens']:,} tokens" if state.get("tokens") else ""
        speed = f", {state['tokens_per_s']:,.0f} tokens/s" if state["state"] == "running" and "tokens" in state else ""
        why = f"; exit code {state['code']}: {state['reason']}" if "code" in state else ""
        lines.append(f"{state['link']:<{width}}  {state['state']:<8}  {state['kind']}{done}{speed}{why}")
    return lines


def runs_of(place: Path) -> list[Path]:
    """The run directories that a person means: of a chain's file or folder those of its links that have begun, in
    order; any other place is a run directory itself.

    Raises:
        ConfigError: none of the chain's runs has begun, or a file is no chain.
    """
    if place.is_file():
        folders = [run.directory for run in load_chain(place).runs.values()]
    else:
        try:
            folders = [Path(folder) for folder in json.loads((place / "chain.json").read_bytes())["links"].values()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return [place]
    begun = [folder for folder in folders if (folder / "events.jsonl").exists()]
    if not begun:
        raise ConfigError(f"{place} is a chain of which no run has begun, so there is nothing to show.")
    return begun
